"""Report: JSON round trip, and what terminal and HTML print, on made-up runs of realistic size."""

import copy
import functools
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archscan.errors import BadInput
from archscan.findings import Bottleneck, GroupUse, capacity_bottlenecks, network_keep_ratio
from archscan.report import views
from archscan.report.branches import branch_rows
from archscan.report.html import render_html
from archscan.report.model import (
    Accuracy,
    CostTotals,
    Data,
    Environment,
    Evaluation,
    GroupRow,
    KeepRatio,
    ModuleRow,
    Report,
    SaliencyLost,
    Target,
    Verification,
    Weights,
    json_text,
    read_report,
)
from archscan.report.page import packed_plotly
from archscan.report.progress import progress_on
from archscan.report.terminal import console, render, render_evaluation, render_verdict, show

# ---------------------------------------------------------------- made-up runs


def conv(path, source, target, kernel, side, width):
    """One convolution: path, groups it reads and writes, kernel area, output pixels."""
    return path, source, target, kernel * kernel, side * side, width


def resnet50():
    layers, groups, channels = [], {"conv1": 64}, {"image": 3, "conv1": 64}
    layers.append(conv("conv1", "image", "conv1", 7, 112, 64))
    stream = "conv1"
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        side, residual = 112 >> stage, f"layer{stage}.0.conv3"
        for block in range(blocks):
            path = f"layer{stage}.{block}"
            layers.append(conv(f"{path}.conv1", stream, f"{path}.conv1", 1, side, width))
            layers.append(conv(f"{path}.conv2", f"{path}.conv1", f"{path}.conv2", 3, side, width))
            layers.append(conv(f"{path}.conv3", f"{path}.conv2", residual, 1, side, 4 * width))
            if block == 0:
                layers.append(conv(f"{path}.downsample.0", stream, residual, 1, side, 4 * width))
            stream = residual
    layers.append(conv("fc", stream, "fc", 1, 1, 1000))
    for _, _, target, _, _, width in layers:
        channels[target] = groups[target] = width
    return layers, groups, channels


def densenet201():
    layers, channels = [conv("features.conv0", "image", "features.conv0", 7, 112, 64)], {"image": 3}
    inputs, side = ["features.conv0"], 56
    for block, count in enumerate((6, 12, 48, 32), start=1):
        for layer in range(1, count + 1):
            path = f"features.denseblock{block}.denselayer{layer}"
            layers += [conv(f"{path}.conv1", source, f"{path}.conv1", 1, side, 128) for source in inputs]
            layers.append(conv(f"{path}.conv2", f"{path}.conv1", f"{path}.conv2", 3, side, 32))
            inputs.append(f"{path}.conv2")
        if block < 4:
            path = f"features.transition{block}.conv"
            width = {1: 128, 2: 256, 3: 896}[block]
            layers += [conv(path, source, path, 1, side, width) for source in inputs]
            inputs, side = [path], side // 2
    layers += [conv("classifier", source, "classifier", 1, 1, 1000) for source in inputs]
    groups = {target: width for _, _, target, _, _, width in layers}
    channels.update(groups)
    return layers, groups, channels


@functools.cache
def made_up(network, name):
    """A slim run with plausible widths: the deeper, the more went; residual streams kept most."""
    layers, groups, channels = network()
    head = layers[-1][2]
    kept = {}
    for place, (group, units) in enumerate(groups.items()):
        stuck = group == head or (units <= 32 and place % 3) or place % 11 == 6
        ratio = 0.62 + 0.3 * math.sin(1.3 * place) - 0.15 * place / len(groups)
        kept[group] = units if stuck else max(8, min(units, 8 * round(ratio * units / 8)))
    rows, totals, after = [], dict.fromkeys(groups, 0), dict(kept, image=3)
    cost = {"macs": 0, "params": 0, "activations": 0}
    slim = dict(cost)
    modules = {}
    for path, source, target, kernel, pixels, _ in layers:
        macs = [kernel * pixels * width[source] * width[target] for width in (channels, after)]
        modules.setdefault(path, [0, 0, 0])
        modules[path] = [modules[path][0] + macs[0], modules[path][1] + macs[0] // pixels, modules[path][2] + macs[1]]
        for place, total in enumerate((cost, slim)):
            total["macs"] += macs[place]
            total["params"] += macs[place] // pixels
            total["activations"] += pixels * (channels, after)[place][target]
        for group in {source, target} & set(groups):
            totals[group] += macs[0]
    for depth, (group, units) in enumerate(groups.items()):
        frozen = group == head
        members = tuple(dict.fromkeys(path for path, source, target, *_ in layers if group in (source, target)))
        share = totals[group] / cost["macs"]
        reason = "network output" if frozen else ""
        rows.append(GroupRow(group, units, kept[group], frozen, reason, members, share, share / 2, depth))
    uses = [GroupUse(row.name, row.units, row.kept, 8, row.frozen, row.macs_share) for row in rows]
    keep = KeepRatio(slim["macs"] / cost["macs"], slim["params"] / cost["params"])
    report = Report(
        archscan="0.1.0",
        command="slim",
        model=name,
        input_shape=(1, 3, 224, 224),
        weights=Weights("pretrained", "timm/" + name + ".a1_in1k"),
        data=Data("folder", 512, 1000, "dataset"),
        criterion="sosp-h",
        seed=0,
        target=Target("macs", 0.6),
        before=CostTotals(**cost),
        after=CostTotals(**slim),
        keep_ratio=keep,
        verification=Verification(True, "", 3.1e-6, 1e-4, True),
        accuracy=Accuracy(0.8012, 0.7634, 5000),
        recovery="BatchNorm statistics recalibrated on 512 images",
        groups=tuple(rows),
        bottlenecks=capacity_bottlenecks(uses, network_keep_ratio(uses)),
        modules=tuple(ModuleRow(path, *numbers) for path, numbers in modules.items()),
        saliency_lost=SaliencyLost(0.0213, 0.0547),
        warnings=(),
        notes=(),
        seconds={"capture": 0.21, "groups": 0.18, "scores": 38.4, "plan": 1.2, "rebuild": 0.4, "verify": 1.9},
        environment=Environment("2.13.0+cpu", "cpu", 2, "3.11.7"),
        command_line=f"archscan {name} --target-flops 0.6 --data images",
    )
    return report


def resnet_report(**changes):
    return replace(made_up(resnet50, "resnet50"), **changes)


def densenet_report(**changes):
    return replace(made_up(densenet201, "densenet201"), **changes)


def random_report():
    return resnet_report(
        weights=Weights("random", "", "pretrained weights could not be downloaded"),
        data=Data("synthetic", 256, 0, "model"),
        accuracy=None,
        recovery=None,
        command_line="archscan resnet50 --target-flops 0.6",
        warnings=("3 layers were not priced: grid_sample.",),
        notes=("Labels were drawn from the model's own predictions (the true Fisher).",),
    )


def scan_report(network=resnet50, name="resnet50"):
    dense = made_up(network, network.__name__)
    return replace(
        dense,
        model=name,
        command="scan",
        weights=None,
        data=None,
        criterion=None,
        target=None,
        after=None,
        keep_ratio=None,
        verification=None,
        accuracy=None,
        recovery=None,
        bottlenecks=(),
        saliency_lost=None,
        groups=tuple(replace(row, kept=row.units) for row in dense.groups),
        modules=tuple(replace(row, macs_after=None) for row in dense.modules),
        command_line=f"archscan scan {name}",
    )


ALL = {"slim": resnet_report, "random": random_report, "dense": densenet_report, "scan": scan_report}


@pytest.fixture(params=ALL, scope="module")
def report(request):
    return ALL[request.param]()


def printed(renderable, width=80, **options):
    target = console(io.StringIO(), width=width, **options)
    show(renderable, target)
    return target.file.getvalue()


# ---------------------------------------------------------------- JSON


SCHEMA = {
    "groups": "name units kept frozen reason members macs_share params_share depth",
    "bottlenecks": "group keep_ratio network_keep_ratio macs_share sentence confidence",
    "modules": "path macs params macs_after activation_bytes activation_bytes_after time_ms time_ms_after "
    "macs_per_byte bound",
    "weights": "kind source reason",
    "data": "kind images classes labels skipped",
    "target": "kind ratio",
    "before": "macs params activations peak_bytes",
    "after": "macs params activations peak_bytes",
    "keep_ratio": "macs params",
    "verification": "applicable reason max_abs_error tolerance passed largest_output",
    "accuracy": "before after samples",
    "saliency_lost": "plan uniform",
    "environment": "torch device threads python",
}
KEYS = """
archscan command model input_shape weights data criterion seed target before after keep_ratio verification accuracy
recovery groups bottlenecks modules saliency_lost warnings notes seconds environment command_line exports history
findings latency further_targets links saliency lossless
"""


def test_the_keys_of_the_summary_are_the_contract():
    summary = resnet_report().to_json()
    assert list(summary) == KEYS.split()
    first = {name: summary[name][0] if isinstance(summary[name], list) else summary[name] for name in SCHEMA}
    assert {name: " ".join(value) for name, value in first.items()} == SCHEMA


def test_round_trip_through_text(report):
    assert Report.from_json(json.loads(json_text(report))) == report


@given(
    st.floats(0, 1, allow_subnormal=False),
    st.integers(0, 2**62),
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.one_of(st.none(), st.floats(-1e9, 1e9)),
)
def test_round_trip_of_any_number_and_text(ratio, count, text, error):
    changed = replace(
        scan_report(resnet50, text),
        before=CostTotals(count, count, count),
        target=Target("params", ratio),
        verification=Verification(False, text, error, None, True),
    )
    assert Report.from_json(json.loads(json_text(changed))) == changed


def test_a_scan_has_nulls_where_nothing_was_slimmed():
    summary = scan_report().to_json()
    assert [summary[name] for name in ("target", "after", "keep_ratio", "verification", "accuracy")] == [None] * 5


EDITS = {
    "missing": lambda data: data.pop("seed"),
    "unknown": lambda data: data.update(extra=1),
    "text for number": lambda data: data["before"].update(macs="many"),
    "negative": lambda data: data["groups"][3].update(units=-1),
    "huge": lambda data: data["before"].update(params=10**400),
    "bool for number": lambda data: data.update(seed=True),
    "float for count": lambda data: data["groups"][0].update(kept=1.5),
    "nan": lambda data: data["keep_ratio"].update(macs=math.nan),
    "list for object": lambda data: data.update(after=[1]),
    "object for list": lambda data: data.update(groups={}),
    "other kind": lambda data: data["target"].update(kind="energy"),
    "other command": lambda data: data.update(command="rm"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_summary_is_refused_in_one_sentence(edit):
    data = copy.deepcopy(resnet_report().to_json())
    EDITS[edit](data)
    with pytest.raises(BadInput, match=r"summary\.json") as refusal:
        Report.from_json(data)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 240


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"archscan": ' + "9" * 5000 + "}", "\x00"])
def test_a_damaged_summary_is_refused(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(BadInput):
        read_report(tmp_path / "summary.json")


def test_a_missing_or_binary_summary_is_refused(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        read_report(tmp_path / "summary.json")
    (tmp_path / "summary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not valid JSON"):
        read_report(tmp_path / "summary.json")


# ---------------------------------------------------------------- bottlenecks


def use(name, kept, *, units=64, floor=8, frozen=False, macs_share=0.1):
    return GroupUse(name, units, kept, floor, frozen, macs_share)


def test_bottlenecks_are_the_free_costly_wide_groups_that_kept_far_more():
    groups = [
        use("gave", 24),
        use("gave more", 16),
        use("stuck", 64),
        use("costly", 64, macs_share=0.2),
        use("nearly", 56),
        use("frozen", 64, frozen=True),
        use("tiny", 64, macs_share=0.001),
        use("at its floor", 8, units=8),
    ]
    found = capacity_bottlenecks(groups, network_keep_ratio=0.6)
    assert [item.group for item in found] == ["costly", "stuck", "nearly"]
    assert found[0].sentence.count(". ") == 2
    assert "none of its 64 channels" in found[0].sentence
    assert "only 8 of its 64 channels" in found[2].sentence


@given(st.lists(st.integers(1, 64), min_size=1, max_size=20))
def test_no_bottleneck_kept_less_than_the_network(kept):
    groups = [use(str(place), width) for place, width in enumerate(kept)]
    network = network_keep_ratio(groups)
    assert network == sum(kept) / (64 * len(kept))
    assert all(item.keep_ratio > network for item in capacity_bottlenecks(groups, network))


def test_a_network_that_gave_nothing_has_no_bottlenecks():
    assert capacity_bottlenecks([use("all", 64)], 1.0) == ()
    assert network_keep_ratio([use("frozen", 64, frozen=True)]) == 1.0


# ---------------------------------------------------------------- rows and numbers


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.000 k"),
        (25_557_032, "25.56 M"),
        (999_950, "1.000 M"),
        (4_089_184_256, "4.089 G"),
    ],
)
def test_si(number, text):
    assert views.si(number) == text


@given(st.integers(1, 2**63))
def test_si_keeps_four_digits_and_never_five(number):
    text, prefix = ([*views.si(number).split(), ""])[:2]
    value = float(text) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[prefix]
    assert value == pytest.approx(number, rel=6e-4)


@pytest.mark.parametrize("limit", [3, 8, 16])
def test_branches_add_up_to_the_network(report, limit):
    rows = branch_rows(report, limit)
    assert len(rows) <= limit
    assert sum(row.macs for row in rows) == report.before.macs
    assert sum(row.params for row in rows) == report.before.params
    assert math.isclose(sum(row.macs_share for row in rows), 1)
    if report.after:
        assert sum(row.macs_after for row in rows) == report.after.macs


def test_branches_open_where_the_cost_is():
    assert [row.path for row in branch_rows(resnet_report())] == [
        "conv1",
        *(f"layer{n}" for n in range(1, 5)),
        "fc",
    ]
    assert [row.path for row in branch_rows(densenet_report())][1] == "features.denseblock1"


def test_branches_of_odd_trees():
    rows = (ModuleRow("", 5, 1), ModuleRow("a", 90, 2), ModuleRow("a.b", 0, 3), ModuleRow("c", 5, 0))
    odd = replace(scan_report(), modules=rows)
    assert [(row.path, row.macs) for row in branch_rows(odd)] == [
        ("(own ops)", 5), ("a (own ops)", 90), ("c", 5), ("a.b", 0)
    ]  # fmt: skip
    assert branch_rows(replace(odd, modules=())) == ()
    assert branch_rows(replace(odd, modules=(ModuleRow("", 0, 0),)))[0].path == "(own ops)"


def test_top_givers_gave_and_are_ordered():
    givers = views.top_givers(resnet_report(), 5)
    gave = [(1 - group.kept / group.units) * group.macs_share for group in givers]
    assert len(givers) == 5
    assert gave == sorted(gave, reverse=True)
    assert gave[-1] > 0


def test_frozen_rows_hold_every_frozen_group_once():
    rows = tuple(
        replace(row, frozen=row.depth % 3 == 0, reason=f"reason {row.depth % 2}") for row in resnet_report().groups
    )
    changed = resnet_report(groups=rows)
    frozen = views.frozen_by_reason(changed)
    assert sorted(group.name for row in frozen for group in row.groups) == sorted(
        row.name for row in rows if row.frozen
    )
    assert sum(row.channels for row in frozen) == views.widths(changed, frozen=True).units


# ---------------------------------------------------------------- terminal


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("colour", [True, False])
def test_terminal_fits_its_width(report, width, colour):
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed(render(report), width, colour=colour))
    assert max(len(line) for line in text.splitlines()) <= width
    assert "1 MAC = 1 FLOP" in text or width == 60


def test_a_pipe_gets_neither_escape_codes_nor_frames(report):
    text = printed(render(report), colour=False)
    assert "\x1b" not in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert not set(text) & set("┃┏┓┗┛│┌┐└┘╭╮╰╯|+")


def test_an_ascii_pipe_gets_ascii(report):
    raw = io.BytesIO()
    target = console(io.TextIOWrapper(raw, encoding="ascii", write_through=True), width=120)
    target.print(render(report))
    assert raw.getvalue().isascii()


def numbers(line):
    return [int(text.replace(",", "")) for text in re.findall(r"(?<![\w.])\d[\d,]*(?=\s|$)", line)]


@pytest.mark.parametrize("make", [resnet_report, densenet_report])
def test_printed_channels_add_up_to_the_printed_total(make):
    lines = printed(render(make()), 120).splitlines()
    start = lines.index("Groups that gave most")
    body = [line for line in lines[start + 3 :] if line.strip()]
    end = next(place for place, line in enumerate(body) if line.strip().startswith("all groups"))
    rows = [numbers(re.sub(r"^\s+(\d+ other groups?|\S+)", "", line))[:2] for line in body[:end]]
    assert len(rows) == 9
    assert [sum(column) for column in zip(*rows, strict=True)] == numbers(body[end])[:2]


@pytest.mark.parametrize("network", [(resnet50, "resnet50"), (densenet201, "densenet201")])
def test_printed_shares_of_the_macs_add_up_to_100_percent(network):
    lines = printed(render(scan_report(*network)), 120).splitlines()
    start = lines.index("Where the MACs go") + 2
    end = next(place for place, line in enumerate(lines) if "whole network" in line)
    shares = [float(re.search(r"([\d.]+)%", line).group(1)) for line in lines[start:end]]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))


def test_the_printed_kept_ratio_is_after_by_before():
    line = next(line for line in printed(render(resnet_report()), 120).splitlines() if line.strip().startswith("MACs"))
    before, after, kept = (float(text) for text in re.findall(r"\d+\.\d+", line)[:3])
    assert 100 * after / before == pytest.approx(kept, abs=0.1)


@pytest.mark.parametrize("colour", [True, False])
def test_banners_come_before_the_numbers(colour):
    text = printed(render(random_report()), colour=colour)
    assert 0 < text.index("RANDOM WEIGHTS") < text.index("SYNTHETIC DATA") < text.index("Cost of one input")
    assert views.banners(resnet_report()) == ()
    assert "random weights" in printed(render_verdict(random_report()))


def test_the_error_of_the_proof_is_relative_to_the_outputs():
    proof = Verification(True, "", 1.2e-5, 12.0, True, largest_output=1.2e10)
    line = views.verification_line(resnet_report(verification=proof))
    assert "largest difference 1.0e-15 of the largest output, tolerance 1e-09 (measured)" in line


def test_a_failed_verification_is_in_verdict_and_banner():
    failed = resnet_report(verification=Verification(True, "", None, 1e-4, False))
    assert "VERIFICATION FAILED" in views.verdict(failed)
    assert views.banners(failed)[0].title == "VERIFICATION FAILED"
    mixing = resnet_report(verification=Verification(False, "LayerNorm at stem", None, None, True))
    assert "does not apply (LayerNorm at stem)" in printed(render(mixing), 200)


def test_the_next_commands_can_be_pasted(tmp_path):
    text = printed(render(resnet_report(), saved_to=tmp_path / "my nets" / ("x" * 90)), 60)
    assert f"archscan evaluate '{tmp_path}/my nets/{'x' * 90}' --data DIR" in text
    assert f"archscan.load('{tmp_path}/my nets/{'x' * 90}')" in text


def test_names_are_neither_markup_nor_escape_codes():
    name = "[red]x[/red]\x1b[2J:smile:"
    rows = tuple(replace(row, name=name + row.name) for row in resnet_report().groups)
    text = printed(render(resnet_report(groups=rows, model=name, warnings=(name,), bottlenecks=())), 200)
    assert "[red]x[/red]\N{REPLACEMENT CHARACTER}[2J:smile:" in text
    assert "\x1b" not in text


def test_an_evaluation_names_both_networks():
    text = printed(
        render_evaluation(Evaluation("resnet50", "out", Accuracy(None, 0.75, 100), ("a.jpg",), ("A note.",)))
    )
    assert "weights not at hand" in text
    assert "75.0%" in text
    assert "1 file skipped" in text


def test_progress_draws_on_a_terminal_only():
    for colour, hidden, drawn in ((True, False, True), (True, True, False), (False, False, False)):
        target = console(io.StringIO(), width=80, colour=colour)
        with progress_on(target, hidden=hidden)("scores [x]") as advance:
            for done in range(3):
                advance(done, 3)
        assert ("scores [x]" in target.file.getvalue()) == drawn


# ---------------------------------------------------------------- HTML


class Page(HTMLParser):
    """Collects tags, attributes and text; complains about tags that do not close."""

    VOID = frozenset({"meta", "input", "br", "wbr", "line", "rect"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_well_formed_self_contained_and_small(report):
    text = render_html(report)
    page = Page(text)
    assert page.open == []
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("script") == 3  # data, Plotly, and what brings the page to life
    assert not [value for name, value in page.attributes if name in ("src", "href") and not value.startswith("#")]
    own = text.replace(packed_plotly(), "")
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|url\(|@import", own)  # that one names, and is not fetched
    assert len(own) < 600_000


def test_html_says_what_the_terminal_says(report):
    words = " ".join(" ".join(Page(render_html(report)).text).split())
    assert views.verdict(report) in words
    for banner in views.banners(report):
        assert banner.title in words
    for row in views.cost_rows(report):
        assert views.si(row.before) in words
    assert all(warning in words for warning in (*report.warnings, *report.notes))


def test_html_links_lead_to_rows_that_exist(report):
    attributes = Page(render_html(report)).attributes
    targets = {value.removeprefix("#") for name, value in attributes if name == "href"}
    assert targets
    assert targets <= {value for name, value in attributes if name == "id"}


def test_html_escapes_every_name():
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    base = random_report()
    hostile = replace(
        base,
        model=attack,
        weights=Weights("file", attack, attack),
        criterion=attack,
        recovery=attack,
        groups=tuple(
            replace(row, name=attack + row.name, reason=attack, members=(attack,), frozen=row.depth < 2)
            for row in base.groups
        ),
        bottlenecks=tuple(replace(item, group=attack + item.group, sentence=attack) for item in base.bottlenecks),
        modules=tuple(replace(row, path=attack + row.path) for row in base.modules),
        warnings=(attack,),
        notes=(attack,),
        seconds={attack: 1.0},
        environment=Environment(attack, attack, 1, attack),
        command_line=attack,
    )
    page = Page(render_html(hostile))
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_html_of_a_network_without_groups():
    empty = replace(scan_report(), groups=(), modules=(), environment=None, seconds={}, command_line="")
    assert "All channel groups" not in render_html(empty)
    assert "no channel groups were found" in printed(render(empty))


def test_a_bottleneck_of_an_unknown_group_is_left_out():
    odd = resnet_report(bottlenecks=(Bottleneck("nowhere", 1.0, 0.5, 0.1, "Odd."),))
    assert "nowhere" not in render_html(odd) + printed(render(odd))
