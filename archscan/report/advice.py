"""What to type for a finding: the command line of a run, a finding → a whole command.

The decision that is not obvious: what was typed is the only place that has network, weights and images as a user names
them, so they are taken from there.
"""

import shlex
from collections.abc import Sequence

from archscan.findings import Finding
from archscan.report.model import Report

_MODEL_AND_DATA = ("--weights", "--input-size", "--num-classes", "--data", "--samples", "--mean", "--std")
_TARGETS = ("--target-flops", "--target-params", "--target-latency", "--target-memory")


def finding_command(report: Report, item: Finding) -> str:
    """Return what to type for a finding: this run's network, weights and images, and the finding's option.

    It keeps the budget where the option neither names one nor needs none. The option alone where the command line of
    the run does not show the network.
    """
    try:
        words = shlex.split(report.command_line)
    except ValueError:  # an edited summary
        return item.option
    named = [word for word in words[1:3] if word not in ("scan", "widen", "sweep")][:1]
    if not item.option or not named or named[0].startswith("-"):
        return item.option
    model = [*named, *_given(words, _MODEL_AND_DATA)]
    if " MODEL " in item.option:
        return item.option.replace(" MODEL ", f" {shlex.join(model)} ")
    has_own = any(name in item.option for name in (*_TARGETS, "--lossless"))
    return f"archscan {shlex.join([*model, *([] if has_own else _given(words, _TARGETS))])} {item.option}"


def _given(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """List the options of these names, with their values, as they were typed."""
    found: list[str] = []
    for word, value in zip(words, (*words[1:], ""), strict=True):
        if word in names:
            found += [word, value]
        elif word.partition("=")[0] in names:
            found.append(word)
    return found
