"""What to do about bottlenecks: bottlenecks, network, measurements → findings with the exact price of widening.

Apart from `capacity`, which is plain numbers, so that reading a report needs neither torch nor numpy.
"""

from collections.abc import Iterator, Mapping, Sequence
from shlex import quote

from archscan.findings.capacity import Bottleneck, what_was_seen, why_it_matters
from archscan.findings.finding import Finding
from archscan.findings.network import Measured, Network


def capacity_findings(
    bottlenecks: Sequence[Bottleneck], network: Network, measured: Mapping[str, Measured]
) -> Iterator[Finding]:
    """Say of each bottleneck what widening it costs, exactly, and what else was measured of its group.

    Args:
        bottlenecks: What `capacity_bottlenecks` found.
        network: The network and its plan.
        measured: Group name → what was measured of it.
    """
    place_of = {group.name: place for place, group in enumerate(network.groups)}
    full = network.cost(network.full_widths_G)
    for found in bottlenecks:
        place = place_of[found.group]
        group, own = network.groups[place], measured.get(found.group, Measured())
        kept = int(network.kept_widths_G[place]) * group.channels_per_step
        widths_G = network.full_widths_G.copy()
        widths_G[place] *= 2
        extra = network.cost(widths_G).macs / full.macs - 1
        seen = what_was_seen(group.name, group.channels, kept, found.network_keep_ratio)
        yield Finding(
            rank=0,
            kind="capacity",
            level="group",
            where=(found.group,),
            seen=f"{seen}{own.votes()}{own.spans()}.",
            why=why_it_matters(found.macs_share),
            remedy=f"Widen it to {2 * group.channels:,} channels, and let the groups that gave most pay for that.",
            option=f"archscan widen MODEL --only {quote(found.group)} --factor 2 --keep-flops",
            gain=f"capacity where it is short, for {100 * extra:.1f}% more MACs before others pay; its accuracy shows"
            " in training",
            confidence=found.confidence,
            measured_on=network.measured_on,
            numbers={
                "keep_ratio": found.keep_ratio,
                "network_keep_ratio": found.network_keep_ratio,
                "macs_share": found.macs_share,
                "extra_macs_share": extra,
                **own.numbers(),
            },
        )
