"""Where a network is wider than what it has learned: plan, activations, dead units → findings with exact savings.

Groups that kept far less than the network did; channels that are dead for any input; channels that were silent,
constant or a copy of another on the images. The decision that is not obvious: what is proven and what was only seen are
two findings. ``--lossless`` removes the first alone; the second cost nothing by their saliency, so that an ordinary
target takes them first, and that is what the finding says to do.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from archscan.dead_units import lossless_kept
from archscan.findings.capacity import FEW, GAVE_ENOUGH, SURE
from archscan.findings.confidence import Votes
from archscan.findings.finding import Finding, Saving
from archscan.findings.network import Measured, Network
from archscan.widths import WidthRule

FAR_BELOW = 2.0
"""A redundant group loses at least so many times what the network loses, at most half way from there to everything."""

SMALL = 0.2
"""A group that loses less than this share of its saliency loses little."""

MOST_REDUNDANT = 8
"""Groups that are named one by one, those that save most first."""

_REPAIRED = " --criterion obc --recover ls"
"""What lets the layers around make up for a channel that is not 0."""

_STEPS = WidthRule(round_to=1, min_width=1)


def far_below(keep: float, network_keep_ratio: float) -> bool:
    """Say whether a kept fraction is far below the network's; False where the network hardly gave anything."""
    loss = 1 - network_keep_ratio
    return loss >= GAVE_ENOUGH and 1 - keep >= min(FAR_BELOW * loss, (1 + loss) / 2)


def redundancy_findings(network: Network, measured: Mapping[str, Measured], lost_G: np.ndarray) -> Iterator[Finding]:
    """Say which groups the plan narrowed far more than the others.

    Args:
        network: The network and its plan.
        measured: Group name → what was measured of it.
        lost_G: Share of the saliency of each group that the plan lost, in [0, 1].
    """
    keep_G = network.kept_widths_G / network.full_widths_G
    whole = network.keep_ratio(keep_G)
    found = []
    for place, group in enumerate(network.groups):
        own = measured.get(group.name, Measured())
        confidence = Votes(own.resamples, own.criteria, own.budgets).confidence
        if group.frozen is not None or group.channels < FEW or not far_below(float(keep_G[place]), whole):
            continue
        if confidence is None or confidence >= SURE:
            widths_G = network.full_widths_G.copy()
            widths_G[place] = network.kept_widths_G[place]
            found.append((network.saving(widths_G), place, own, confidence))
    found.sort(key=lambda each: (-each[0].macs, each[1]))
    for saving, place, own, confidence in found[:MOST_REDUNDANT]:
        yield _redundant(network, place, saving, own, confidence, float(lost_G[place]), whole)


def _redundant(
    network: Network,
    place: int,
    saving: Saving,
    own: Measured,
    confidence: float | None,
    lost: float,
    whole: float,
) -> Finding:
    group, keep = network.groups[place], int(network.kept_widths_G[place])
    kept, ratio = keep * group.channels_per_step, keep / group.steps
    macs, params = network.shares(saving)
    seen = (
        f"{group.name} keeps only {kept:,} of its {group.channels:,} channels ({100 * ratio:.1f}%) where the network "
        f"keeps {100 * whole:.1f}%"
    )
    return Finding(
        rank=0,
        kind="redundancy",
        level="group",
        where=(group.name,),
        seen=f"{seen}{own.votes()}{own.spans()}.",
        why=f"The other {group.channels - kept:,} channels cost {100 * macs:.1f}% of the MACs and hold "
        f"{'only ' * (lost < SMALL)}{100 * lost:.1f}% of the group's saliency.",
        remedy="Let a plan narrow it, as this one does; a design from scratch may start from that width.",
        option=f"--target-flops {_ratio(1 - macs)}",
        gain=f"{100 * macs:.1f}% of the MACs and {100 * params:.1f}% of the parameters"
        + (", at little loss" if lost < SMALL else ""),
        confidence=confidence,
        measured_on=network.measured_on,
        saving=saving,
        numbers={
            "keep_ratio": ratio,
            "network_keep_ratio": whole,
            "saliency_share_lost": lost,
            "macs_share_saved": macs,
            "params_share_saved": params,
            **own.numbers(),
        },
    )


@dataclass(frozen=True, eq=False)
class _Removal:
    """Units that could go, and what that saves."""

    groups: tuple[str, ...]
    channels: int
    saving: Saving


def _removal(network: Network, gone_U: np.ndarray, *, lossless: bool = False) -> _Removal | None:
    """Take out as many of some units as equal counts in all fibres allow; None where that is none."""
    kept = lossless_kept(network.groups, gone_U, _STEPS)
    widths_G = np.array([len(kept[group.name][0]) for group in network.groups])
    lost_G = (network.full_widths_G - widths_G) * np.array([group.channels_per_step for group in network.groups])
    if not lost_G.any():
        return None
    order = sorted(np.flatnonzero(lost_G).tolist(), key=lambda place: (-lost_G[place], place))
    names = tuple(network.groups[place].name for place in order)
    return _Removal(names, int(lost_G.sum()), network.saving(widths_G, lossless=lossless))


def dead_findings(network: Network, dead_U: np.ndarray) -> Iterator[Finding]:
    """Say which channels are dead for any input; all of them are one finding."""
    found = _removal(network, dead_U, lossless=True)
    if found is None:
        return
    macs, params = network.shares(found.saving)
    yield Finding(
        rank=0,
        kind="dead",
        level="group",
        where=found.groups,
        seen=f"{_channels(found, 'is', 'are')} dead: whatever the input, layers read 0 from them or have weights 0.",
        why=f"They cost {100 * macs:.2f}% of the MACs and {100 * params:.2f}% of the parameters and change no output.",
        remedy="Remove them; the network that is left is proven equal to the original.",
        option="--lossless",
        gain=f"{found.saving.macs:,} MACs and {found.saving.params:,} parameters, with no loss at all",
        saving=found.saving,
        numbers={"channels": found.channels, "macs_share_saved": macs, "params_share_saved": params},
    )


def silent_findings(network: Network, silent_U: np.ndarray, images: int) -> Iterator[Finding]:
    """Say which channels were 0 throughout on the images, of those that are not dead for any input.

    Args:
        network: The network and its plan.
        silent_U: Which units these are, boolean.
        images: How many images were seen.
    """
    found = _removal(network, silent_U)
    if found is not None:
        yield _seen(
            network,
            found,
            images,
            seen=f"{_channels(found, 'was', 'were')} never active, at any position of any of {images:,} images.",
            why=" and do nothing on images like these; others might wake them.",
            remedy="Let a plan take them, which it does at no loss, since their saliency is 0.",
        )


def constant_findings(network: Network, constant_U: np.ndarray, images: int) -> Iterator[Finding]:
    """Say which channels gave one value other than 0 throughout on the images; arguments as in `silent_findings`."""
    found = _removal(network, constant_U)
    if found is not None:
        yield _seen(
            network,
            found,
            images,
            seen=f"{_channels(found, 'was', 'were')} constant, but not 0, on all of {images:,} images.",
            why=" and tell no image from another; a bias could stand in for them.",
            remedy="Protect no layer around them, and let repair move what they give into the biases of their readers.",
            further=_REPAIRED,
        )


def twin_findings(
    network: Network, twins_by_group: Mapping[int, Sequence[Sequence[int]]], images: int
) -> Iterator[Finding]:
    """Say which channels repeat another one of their group on the images.

    Args:
        network: The network and its plan.
        twins_by_group: Group number → sets of units that say the same.
        images: How many images were seen.
    """
    copies_U = np.zeros(1 + max((unit for g in network.groups for f in g.units for unit in f), default=0), dtype=bool)
    for sets in twins_by_group.values():
        for members in sets:
            copies_U[list(members[1:])] = True
    found = _removal(network, copies_U)
    if found is not None:
        yield _seen(
            network,
            found,
            images,
            kind="duplicate",
            seen=f"{_channels(found, 'repeats', 'repeat')} another channel of the group, scaled and shifted, on all of "
            f"{images:,} images.",
            why=", and layers that read the other channel could do without them.",
            remedy="Slim by a criterion that sees what other channels make up for; least squares moves the weights.",
            further=_REPAIRED,
        )


def _seen(
    network: Network,
    found: _Removal,
    images: int,
    *,
    kind: Literal["dead", "duplicate"] = "dead",
    seen: str,
    why: str,
    remedy: str,
    further: str = "",
) -> Finding:
    """Make a finding of what was seen on images; `why` goes on after what the channels cost."""
    macs, params = network.shares(found.saving)
    return Finding(
        rank=0,
        kind=kind,
        level="group",
        where=found.groups,
        seen=seen,
        why=f"They cost {100 * macs:.2f}% of the MACs{why}",
        remedy=remedy,
        option=f"--target-flops {_ratio(1 - macs)} --round-to 1{further}",
        gain=f"{found.saving.macs:,} MACs and {found.saving.params:,} parameters, at no loss on images like these",
        confidence=max(0.0, 1 - 3 / images),  # not seen in N: 95% sure that it happens in less than 3 / N
        measured_on=f"{images:,} images",
        saving=found.saving,
        numbers={"channels": found.channels, "macs_share_saved": macs, "params_share_saved": params},
    )


def _channels(found: _Removal, one: str, several: str) -> str:
    where = f"in {len(found.groups):,} groups" if len(found.groups) > 1 else f"in {found.groups[0]}"
    single = found.channels == 1
    return f"{found.channels:,} channel{'' if single else 's'} {where} {one if single else several}"


def _ratio(kept: float) -> str:
    """Print a target that leaves at least this fraction of the MACs."""
    return f"{min(1.0, math.ceil(kept * 1000) / 1000):g}"
