"""What archscan refuses, one class per kind of refusal.

Every message is one sentence that says what is wrong, where, and what to do. The command line prints it and exits with
``exit_code``; from Python it is an ordinary exception. Under ``torchrun`` one process says what all of them refuse.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager


class ArchscanError(Exception):
    """A refusal that a user can act on."""

    exit_code = 2


class BadInput(ArchscanError):
    """An argument, a file or a model that archscan cannot work with."""


class OtherEnded(ArchscanError):
    """Another process of the same run refused, or is gone; the first process says so."""


class UnsupportedOp(ArchscanError):
    """An ATen op that the coupling table has no rule for."""


class InfeasibleBudget(ArchscanError):
    """A target below what the minimum widths, the frozen and the protected groups allow."""


class RebuildMismatch(ArchscanError):
    """A rebuilt network that is not the masked original, or does not cost what the plan says."""

    exit_code = 3


def is_first() -> bool:
    """Say whether this process is the one that prints, before any connection is made."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def said_once() -> Iterator[None]:
    """Let only the first process say what all of them refuse."""
    try:
        yield
    except ArchscanError as error:
        if is_first() or isinstance(error, OtherEnded):
            raise
        ended = OtherEnded(str(error))
        ended.exit_code = error.exit_code
        raise ended from error
