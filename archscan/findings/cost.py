"""Where a network spends: costs of modules, widths of groups → findings.

Works on counted costs alone; where modules were timed too, layers whose share of the time is far from their share of
the MACs are found. The decision that is not obvious: a finding names few layers. That convolutions cost MACs is no
news, so that only what holds far more than its even share is told.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from archscan.findings.finding import Finding

DEAR = 0.05
"""A layer below this share of the time (or of what it is measured by) is not worth a finding."""

FAR = 2.0
"""A layer's share of the time is far from its share of the MACs where it is at least so many times as large."""

WITHOUT_MACS = 0.15
"""Modules without MACs are worth a finding from this share of the time on."""

MOST_SLOW = 4
HALF = 0.5
FEW_LAYERS = 0.15
"""Half of the MACs in at most this fraction of the layers is worth saying."""

BLOCKS = (8, 16, 32)
"""Channels that hardware handles at once."""

SMALL = 16
"""Widths below are left alone: narrow layers are bound by memory, not by blocks."""


@dataclass(frozen=True)
class ModuleCost:
    """Cost of one module, its children not included; None where not counted or not measured.

    Attributes:
        path: Module path.
        macs: For one input.
        params: Parameters.
        activation_bytes: What its ops write for one input.
        time_ms: Its own time in a forward pass.
        macs_per_byte: Arithmetic intensity.
        bound: ``memory`` or ``compute``, by the machine's roofline.
    """

    path: str
    macs: int
    params: int
    activation_bytes: int | None = None
    time_ms: float | None = None
    macs_per_byte: float | None = None
    bound: str | None = None


@dataclass(frozen=True)
class GroupWidth:
    """Width of a channel group in the network that will run."""

    name: str
    channels: int
    macs_share: float


def cost_findings(
    modules: Sequence[ModuleCost], groups: Sequence[GroupWidth], timed_on: str = ""
) -> tuple[Finding, ...]:
    """Say where MACs, parameters, activations and time go, and which widths suit the hardware badly.

    Args:
        modules: Every module with a cost.
        groups: Every group that may have another width.
        timed_on: What the times were measured on, such as ``cpu, 1 thread``; empty where there are none.
    """
    return (
        *_slow(modules, timed_on),
        *_idle(modules, timed_on),
        *_written(modules),
        *_concentrated(modules),
        *_heavy(modules),
        *_awkward(groups),
    )


def _shares(modules: Sequence[ModuleCost], name: str) -> dict[str, float]:
    """Give each module's share of a cost by path; empty where it is not known of all that have MACs."""
    values = {module.path: getattr(module, name) for module in modules}
    if any(value is None and module.macs for module, value in zip(modules, values.values(), strict=True)):
        return {}
    total = sum(value or 0 for value in values.values())
    return {path: (value or 0) / total for path, value in values.items()} if total > 0 else {}


def _slow(modules: Sequence[ModuleCost], timed_on: str) -> Iterator[Finding]:
    """Find layers that take far more of the time than of the MACs."""
    times, macs = _shares(modules, "time_ms"), _shares(modules, "macs")
    slow = [
        each
        for each in modules
        if times and each.macs and times[each.path] >= max(DEAR, FAR * macs.get(each.path, 0.0))
    ]
    slow.sort(key=lambda each: -times[each.path])
    for each in slow[:MOST_SLOW]:
        share, own = times[each.path], macs.get(each.path, 0.0)
        intensity = "" if each.macs_per_byte is None else f" at {each.macs_per_byte:.1f} MACs per byte"
        bound = f"it is bound by {each.bound}{intensity}" if each.bound else "MACs say little about its speed"
        yield Finding(
            rank=0,
            kind="cost",
            level="module",
            where=(each.path,),
            seen=f"{each.path or 'the model itself'} takes {100 * share:.1f}% of the time and does {100 * own:.1f}% of "
            "the MACs.",
            why=f"A budget in MACs passes it by: {bound}.",
            remedy="Set the target on measured time, so that the plan pays for what this machine is slow at.",
            option="--target-latency 0.6",
            gain=f"up to {100 * (share - own):.1f}% of the time, if it ran at the network's average speed",
            measured_on=timed_on,
            numbers={"time_share": share, "macs_share": own, "time_ms": each.time_ms or 0.0},
        )


def _idle(modules: Sequence[ModuleCost], timed_on: str) -> Iterator[Finding]:
    """Find what modules without MACs, normalisations and the like, take of the time together."""
    times = _shares(modules, "time_ms")
    found = [each for each in modules if times and not each.macs and times[each.path] > 0]
    share = sum(times[each.path] for each in found)
    if share < WITHOUT_MACS:
        return
    found.sort(key=lambda each: -times[each.path])
    yield Finding(
        rank=0,
        kind="cost",
        level="module",
        where=tuple(each.path for each in found),
        seen=f"{len(found)} modules without any MACs, such as {found[0].path or 'the model itself'}, take "
        f"{100 * share:.1f}% of the time.",
        why="They only move activations through memory, and fewer MACs alone do not make them faster.",
        remedy="Set the target on measured time; compiling the network fuses most of them into their neighbours.",
        option="--target-latency 0.6",
        gain=f"up to {100 * share:.1f}% of the time",
        measured_on=timed_on,
        numbers={"time_share": share, "macs_share": 0.0, "modules": float(len(found))},
    )


def _written(modules: Sequence[ModuleCost]) -> Iterator[Finding]:
    """Where nothing was timed: find layers that write far more than they compute; memory binds them as a rule."""
    if any(module.time_ms is not None for module in modules):
        return
    written, macs = _shares(modules, "activation_bytes"), _shares(modules, "macs")
    found = [
        each for each in modules if written and written[each.path] >= max(DEAR, 2 * FAR * macs.get(each.path, 0.0))
    ]
    if not found:
        return
    found.sort(key=lambda each: -written[each.path])
    share, own = (sum(shares.get(each.path, 0.0) for each in found) for shares in (written, macs))
    few = f"{len(found)} modules write" if len(found) > 1 else f"{found[0].path or 'the model itself'} writes"
    yield Finding(
        rank=0,
        kind="cost",
        level="module",
        where=tuple(each.path for each in found),
        seen=f"{few} {100 * share:.1f}% of the activation bytes for {100 * own:.1f}% of the MACs.",
        why="Such layers wait for memory, so that they cost more time than their MACs say; this is counted, not timed.",
        remedy="Measure the time of each module before you set a target in MACs.",
        option="--latency",
        gain="a target on what really takes the time",
        numbers={"activation_bytes_share": share, "macs_share": own},
    )


def _concentrated(modules: Sequence[ModuleCost]) -> Iterator[Finding]:
    """Find the few layers that do half of the MACs, where they are few."""
    macs = {path: share for path, share in _shares(modules, "macs").items() if share > 0}
    order = sorted(macs, key=lambda path: -macs[path])
    total, chosen = 0.0, []
    for path in order:
        if total >= HALF:
            break
        total += macs[path]
        chosen.append(path)
    if not chosen or len(chosen) > FEW_LAYERS * len(macs):
        return
    layers = f"{len(chosen)} of {len(macs)} layers do" if len(chosen) > 1 else f"{chosen[0]} alone does"
    yield Finding(
        rank=0,
        kind="cost",
        level="module",
        where=tuple(chosen),
        seen=f"{layers} {100 * total:.1f}% of the MACs.",
        why="What is saved anywhere else hardly shows.",
        remedy="Slim to a budget in MACs, which these layers' channels pay first unless they are hard to spare.",
        option="--target-flops 0.6",
        gain=f"every tenth of their channels is about {10 * total:.1f}% of the MACs",
        numbers={"macs_share": total, "layers": len(chosen)},
    )


def _heavy(modules: Sequence[ModuleCost]) -> Iterator[Finding]:
    """Find a layer that holds a large share of the parameters and does few of the MACs."""
    params, macs = _shares(modules, "params"), _shares(modules, "macs")
    for path, share in sorted(params.items(), key=lambda item: -item[1]):
        own = macs.get(path, 0.0)
        if share < 0.3 or share < 4 * own:
            return
        yield Finding(
            rank=0,
            kind="cost",
            level="module",
            where=(path,),
            seen=f"{path or 'the model itself'} holds {100 * share:.1f}% of the parameters and does {100 * own:.1f}% of"
            " the MACs.",
            why="It decides how large the file is and how long it loads, and a budget in MACs leaves it as it is.",
            remedy="Set a target on parameters, alone or beside the one on MACs.",
            option="--target-params 0.6",
            gain=f"up to {100 * share:.1f}% of the parameters",
            numbers={"params_share": share, "macs_share": own},
        )


def _awkward(groups: Sequence[GroupWidth]) -> Iterator[Finding]:
    """Find widths that leave part of a block of channels empty."""
    wide = [group for group in groups if group.channels >= SMALL]
    odd = [group for group in wide if group.channels % BLOCKS[0]]
    if not odd:
        return
    odd.sort(key=lambda group: (-group.macs_share, group.name))
    padded = {group.name: -(-group.channels // BLOCKS[0]) * BLOCKS[0] for group in odd}
    idle = {group.name: 1 - group.channels / padded[group.name] for group in odd}
    lanes = sum(group.macs_share * idle[group.name] for group in odd) / max(sum(each.macs_share for each in groups), 1)
    fits = {block: sum(group.channels % block == 0 for group in wide) for block in BLOCKS}
    worst = odd[0]
    yield Finding(
        rank=0,
        kind="width",
        level="group",
        where=tuple(group.name for group in odd),
        seen=f"{len(odd)} of {len(wide)} groups have widths that are no multiple of {BLOCKS[0]}, such as "
        f"{worst.channels} in {worst.name}.",
        why=f"Kernels work on {', '.join(map(str, BLOCKS[:-1]))} or {BLOCKS[-1]} channels at once, and up to "
        f"{100 * max(idle.values()):.0f}% of a layer does nothing.",
        remedy=f"Round widths to multiples of {BLOCKS[0]}, or to what is measured to be fast by --target-latency.",
        option=f"--round-to {BLOCKS[0]}",
        gain="the same time with more channels, or fewer idle lanes",
        numbers={
            "groups": len(odd),
            "idle_share": lanes,
            **{f"multiples_of_{block}": float(count) for block, count in fits.items()},
        },
    )
