"""What archscan refuses, one class per kind of refusal.

Every message is one sentence that says what is wrong, where, and what to do. The command line prints it and exits with
``exit_code``; from Python it is an ordinary exception.
"""


class ArchscanError(Exception):
    """A refusal that a user can act on."""

    exit_code = 2


class BadInput(ArchscanError):
    """An argument, a file or a model that archscan cannot work with."""


class UnsupportedOp(ArchscanError):
    """An ATen op that the coupling table has no rule for."""


class InfeasibleBudget(ArchscanError):
    """A target below what the minimum widths, the frozen and the protected groups allow."""


class RebuildMismatch(ArchscanError):
    """A rebuilt network that is not the masked original, or does not cost what the plan says."""

    exit_code = 3
