"""Results side by side, and several budgets from one scoring."""

import importlib
import io
import itertools
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import archscan
from archscan import closing, comparing, stages
from archscan.budgets import Budget
from archscan.errors import BadInput, InfeasibleBudget
from archscan.reference_nets import REFERENCE_NETS
from archscan.report.compare import Given, compare, front, json_text
from archscan.report.compare_html import render_comparison_html
from archscan.report.compare_terminal import render_comparison, render_comparison_verdict
from archscan.report.compare_views import verdict
from archscan.report.model import Accuracy, Environment, KeepRatio, Latency, SaliencyLost, Target
from archscan.report.model import json_text as summary_text
from archscan.report.page import packed_plotly
from archscan.report.terminal import console, show
from archscan.slimming import SlimSettings, slim, slim_each
from tests.conftest import ROOT
from tests.test_report import densenet_report, random_report, resnet_report

MADE = {"data": "images", "rounds": 1, "set_effects": "additive", "recover": "bn"}
ATTACK = '</script><script>window.attacked=1</script><img src="x" onerror="attacked=1">{{7*7}}<b>'


def budget(ratio, accuracy=None, **changes):
    """One made-up result at a budget: the less is kept, the more is lost."""
    base = resnet_report()
    groups = tuple(
        replace(row, kept=row.units if row.frozen else max(1, int(ratio * row.units))) for row in base.groups
    )
    accuracy = Accuracy(0.80, accuracy, 5000) if isinstance(accuracy, float) else accuracy
    values = {
        "target": Target("macs", ratio),
        "keep_ratio": KeepRatio(ratio, ratio - 0.05),
        "after": replace(
            base.after, macs=int(ratio * base.before.macs), params=int((ratio - 0.05) * base.before.params)
        ),
        "groups": groups,
        "saliency_lost": SaliencyLost((1 - ratio) ** 2, 2 * (1 - ratio) ** 2),
        "accuracy": accuracy,
        **changes,
    }
    return replace(base, **values)


def together(*reports, **made):
    return compare([Given(f"r{place}", f"/x/r{place}", report, MADE | made) for place, report in enumerate(reports)])


def sweep():
    return together(budget(0.9, 0.79), budget(0.7, 0.77), budget(0.5, 0.70))


def mixed():
    """By two criteria, one result beaten by another, its name an attack."""
    attacked = replace(budget(0.7, 0.72, criterion="magnitude"), model=ATTACK)
    rows = [Given("flops0.9", "a", budget(0.9, 0.79), MADE), Given("flops0.7", "b", budget(0.7, 0.77), MADE)]
    groups = tuple(replace(row, name=f"{ATTACK}.{row.name}") for row in attacked.groups)
    return compare([*rows, Given(ATTACK, "c", replace(attacked, groups=groups), MADE | {"data": ATTACK})])


# ---------------------------------------------------------------- numbers


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_holds_what_no_other_beats(points):
    costs, losses = zip(*points, strict=True)
    found = set(front(costs, losses))
    for place, (cost, loss) in enumerate(points):
        beaten = any(c <= cost and worse <= loss and (c, worse) != (cost, loss) for c, worse in points)
        assert (place in found) != beaten


def test_a_sweep_is_compared_by_accuracy_and_by_saliency():
    found = sweep()
    assert found.differing == ("target",)
    assert [axis.kind for axis in found.costs] == ["macs", "params"]
    assert [(axis.kind, axis.dense) for axis in found.qualities] == [("accuracy", 0.80), ("saliency", 0.0)]
    assert found.qualities[0].values == (0.79, 0.77, 0.70)
    assert found.fronts[0].results == ("r2", "r1", "r0")
    assert found.notes == ()
    assert verdict(found).startswith("3 budgets of resnet50: top-1 accuracy on 5,000 images 79.0% (-1.0) at 90.0% to")


def test_a_result_that_another_beats_is_not_on_the_front():
    found = mixed()
    assert (found.fronts[0].quality, found.fronts[0].results) == ("accuracy", ("flops0.7", "flops0.9"))
    assert "no other result beats flops0.7 and flops0.9" in verdict(found)


def test_groups_stand_side_by_side_in_depth_order():
    other = budget(0.5)
    found = together(budget(0.9), replace(other, groups=other.groups[1:]))
    assert [group.name for group in found.groups] == [row.name for row in budget(0.9).groups]
    assert found.groups[0].kept[1] is None
    assert found.groups[1].kept == (budget(0.9).groups[1].kept, other.groups[1].kept)


def timed(threads):
    return Latency(40.0, 1.0, 20.0, 1.0, 0.5, 0.48, 0.52, 20, 1, threads, "contiguous", "cpu")


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        ({"accuracy": Accuracy(0.8, 0.7, 100)}, {}, "Accuracies are not compared: they were measured on different"),
        ({"accuracy": Accuracy(0.7, 0.7, 5000)}, {}, "Accuracies are not compared: they were measured on different"),
        ({"accuracy": None}, {}, "Accuracies are not compared: only 1 of 2 results have one"),
        ({"criterion": "obd"}, {}, "Saliencies lost are not compared: the results differ by criterion"),
        ({"seed": 1}, {}, "Saliencies lost are not compared: the results differ by seed"),
        ({"latency": timed(1)}, {"latency": timed(2)}, "Times are not compared: they were measured on different"),
        ({"latency": timed(1)}, {}, "Times are not compared: only 1 of 2 results have one"),
    ],
)
def test_what_does_not_mean_the_same_is_not_compared(one, two, said):
    found = together(budget(0.9, **{"accuracy": Accuracy(0.8, 0.79, 5000), **one}), budget(0.7, 0.77, **two))
    assert [note for note in found.notes if note.startswith(said)]
    assert together(budget(0.9, 0.79, latency=timed(1)), budget(0.7, 0.77, latency=timed(1))).notes == ()


def test_versions_and_fine_tuning_do_not_keep_saliencies_apart():
    other = replace(budget(0.7), archscan="0.2.0", environment=Environment("2.14.0", "cpu", 2, "3.11.7"))
    assert [axis.kind for axis in together(budget(0.9), other).qualities] == ["saliency"]


def test_the_json_has_everything_and_nothing_that_json_cannot_say():
    data = json.loads(json_text(sweep()))
    assert [row["name"] for row in data["results"]] == ["r0", "r1", "r2"]
    assert data["fronts"][0] == {"quality": "accuracy", "cost": "macs", "results": ["r2", "r1", "r0"]}
    assert len(data["groups"]) == len(resnet_report().groups)


def test_other_networks_are_refused():
    with pytest.raises(BadInput, match=r"r0 is of resnet50 .* and r1 of densenet201 .*; compare results of one"):
        together(budget(0.9), densenet_report())


# ---------------------------------------------------------------- terminal


def printed(renderable, width, *, colour=False):
    target = console(io.StringIO(), width=width, colour=colour)
    show(renderable, target)
    return target.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("make", [sweep, mixed])
def test_it_fits_its_width(make, width, colour):
    found = make()
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed(render_comparison(found), width, colour=colour))
    assert max(len(line) for line in text.splitlines()) <= width
    for axis in found.qualities:
        assert ("top-1" if axis.kind == "accuracy" else "saliency lost") in text
    assert all(f"{100 * result.keep_ratio.macs:.1f}%" in text for result in found.results)


def test_many_results_do_not_break_the_table_of_groups():
    found = together(*(budget(1 - step / 20, 0.8 - step / 50) for step in range(1, 16)))
    text = printed(render_comparison(found), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "results 7 to 15: in the page" in text


def test_noise_and_random_weights_are_said_first():
    alarming = replace(random_report(), groups=budget(0.5).groups)
    text = printed(render_comparison(together(budget(0.9), alarming)), 100)
    assert text.index("RANDOM WEIGHTS in 1 of 2 results") < text.index("Results")
    short = printed(render_comparison_verdict(together(alarming, alarming)), 80)
    assert "[random weights] [synthetic data]" in short
    assert short.count("\n") == 1


# ---------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folders of a sweep from the command line."""
    from archscan.cli import main

    folder = tmp_path_factory.mktemp("sweep") / "out"
    typed = f"sweep lenet5 --weights random --criterion magnitude --targets 0.8,0.5 --output {folder} --quiet"
    assert main(typed.split()) == 0
    return folder


def test_a_sweep_saves_what_each_slimming_would(swept, typed):
    assert sorted(path.name for path in swept.iterdir()) == ["compare.html", "flops0.5", "flops0.8"]
    alone = typed(
        *[
            "lenet5",
            "--weights",
            "random",
            "--criterion",
            "magnitude",
            "--target-flops",
            "0.5",
            "--output",
            "alone",
            "--quiet",
        ]
    )
    assert alone.code == 0
    one, other = (archscan.load(folder).state_dict() for folder in (swept / "flops0.5", "alone"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_compare_reads_folders(swept, typed, tmp_path):
    said = typed("compare", swept / "flops0.8", swept / "flops0.5", "--output", tmp_path / "new" / "page.html")
    assert said.code == 0
    assert "flops0.8" in said.out
    assert "RANDOM WEIGHTS" in said.out
    page = (tmp_path / "new" / "page.html").read_text()
    assert page == (swept / "compare.html").read_text()
    data = json.loads(typed("compare", swept / "flops0.8", swept / "flops0.5", "--json").out)
    assert [row["name"] for row in data["results"]] == ["flops0.8", "flops0.5"]


def test_names_are_as_short_as_can_be(tmp_path):
    folders = [tmp_path / name for name in ("a/x", "b/x", "b/y")]
    assert comparing.short_names(folders[1:]) == ("x", "y")
    assert comparing.short_names(folders) == ("a/x", "b/x", "b/y")


def refusal(said):
    assert said.code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_what_cannot_be_compared_is_refused_in_one_sentence(swept, typed, tmp_path):
    one, other = swept / "flops0.8", swept / "flops0.5"
    assert "one result alone cannot be compared" in refusal(typed("compare", one))
    assert "is given twice" in refusal(typed("compare", one, f"{one}/"))
    assert "there is no folder" in refusal(typed("compare", one, tmp_path / "nowhere"))
    assert "cannot be read" in refusal(typed("compare", one, swept))
    assert "does not end in .html" in refusal(typed("compare", one, other, "--output", tmp_path / "page"))
    (tmp_path / "there.html").write_text("mine")
    assert "pass --overwrite" in refusal(typed("compare", one, other, "--output", tmp_path / "there.html"))
    assert (tmp_path / "there.html").read_text() == "mine"
    broken = shutil.copytree(other, tmp_path / "broken")
    (broken / "summary.json").write_text("{}")
    refusal(typed("compare", one, broken))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("0.9", "is one budget"),
        ("0.9,0.90", "asks for 0.9 twice"),
        ("0.9,60", "not a kept fraction"),
        ("0.9,0.001", "is below what the minimum widths"),
    ],
)
def test_a_sweep_that_makes_no_sense_writes_nothing(typed, tmp_path, targets, said):
    ran = typed("sweep", "lenet5", "--weights", "random", "--targets", targets, "--output", tmp_path / "out")
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert ran.code == 2
    assert not (tmp_path / "out").exists()


def test_a_sweep_does_not_write_over_results_or_into_one(swept, typed):
    plain = ("sweep", "lenet5", "--weights", "random", "--targets", "0.7,0.6")
    assert "compare.html exists; pass --overwrite" in refusal(typed(*plain, "--output", swept))
    assert "is a saved result" in refusal(typed(*plain, "--output", swept / "flops0.5"))


def test_an_interrupted_sweep_leaves_whole_folders_only(typed, tmp_path, monkeypatch):
    saved = closing.save_result
    count = itertools.count(1)

    def save(*given, **named):
        if next(count) == 2:
            raise KeyboardInterrupt
        return saved(*given, **named)

    monkeypatch.setattr(closing, "save_result", save)
    plain = [
        "sweep",
        "lenet5",
        "--weights",
        "random",
        "--criterion",
        "magnitude",
        "--targets",
        "0.8,0.6,0.5",
        "--output",
        "out",
    ]
    assert typed(*plain).code == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["flops0.8"]
    archscan.load(tmp_path / "out" / "flops0.8")


# ---------------------------------------------------------------- one scoring


def lenet_and_data():
    model = REFERENCE_NETS["lenet5"].factory()
    data = TensorDataset(torch.randn(24, 1, 28, 28), torch.arange(24) % 10)
    return model, torch.randn(1, 1, 28, 28), DataLoader(data, batch_size=8, shuffle=True)


@pytest.mark.parametrize("rounds", [1, 2])
def test_many_budgets_give_what_each_alone_gives_and_score_once(monkeypatch, rounds):
    torch.manual_seed(0)
    model, image, data = lenet_and_data()
    scored = []
    collect = stages.collect
    monkeypatch.setattr(stages, "collect", lambda *given, **named: scored.append(1) or collect(*given, **named))
    settings = SlimSettings(seed=3, rounds=rounds, recover="bias")
    ratios = (0.8, 0.5)
    state = torch.get_rng_state()
    budgets = [Budget("macs", ratio) for ratio in ratios]
    together = list(slim_each(model, image, budgets, data=data, criterion="taylor-fo", settings=settings))
    assert torch.equal(state, torch.get_rng_state())
    assert len(scored) == 1 + (rounds - 1) * len(ratios)
    torch.manual_seed(9)  # what comes out follows from the seed of the settings alone
    for ratio, result in zip(ratios, together, strict=True):
        alone = slim(model, image, target_flops=ratio, data=data, criterion="taylor-fo", settings=settings)
        assert alone.plan == result.plan
        mine, other = alone.model.state_dict(), result.model.state_dict()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_budget_out_of_reach_is_refused_before_anything_is_scored(monkeypatch):
    model, image, _ = lenet_and_data()
    monkeypatch.setattr(stages, "collect", None)
    with pytest.raises(InfeasibleBudget):
        next(slim_each(model, image, [Budget("macs", 0.9), Budget("macs", 1e-4)], criterion="magnitude"))


# ---------------------------------------------------------------- the page


def test_the_page_is_one_small_file():
    page = render_comparison_html(mixed())
    assert len(page.encode()) < 6_000_000
    own = page.replace(packed_plotly(), "")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|<link|src=\"(?!x)", own)
    assert page == render_comparison_html(mixed())


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("THE PAGE OF A COMPARISON WAS NOT OPENED: chromium is not installed; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


def test_the_gallery_shares_what_is_large(browser, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    gallery = importlib.import_module("gallery")
    for name, report in (("resnet56-cifar10", resnet_report()), ("hrnet-w18", random_report())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(summary_text(report), encoding="utf-8")
    rows = gallery.write_pages(tmp_path)
    assert [name for name, _ in rows] == ["resnet56-cifar10", "hrnet-w18"]
    assert (tmp_path / "hrnet-w18" / "report.html").stat().st_size < 400_000
    page, wrong = browser.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto((tmp_path / "index.html").as_uri())
    page.get_by_role("link", name="hrnet-w18").click()
    page.wait_for_selector("#treemap .main-svg")
    assert page.get_by_role("alert").first.inner_text().startswith("RANDOM WEIGHTS")
    page.close()
    assert wrong == []


@pytest.mark.parametrize(("make", "width", "dark"), [(sweep, 390, True), (mixed, 1280, False)])
def test_the_page_draws_everything_and_asks_for_nothing(browser, tmp_path, make, width, dark):
    from axe_playwright_python.sync_playwright import Axe

    found, file, wrong = make(), tmp_path / "page.html", []
    file.write_text(render_comparison_html(found), encoding="utf-8")
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    page.wait_for_selector("#overlay .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#overlay .scatterlayer .trace").count() == len(found.results)
    assert page.locator("#pareto .points path").count() == len(found.results) + 1
    page.locator("input[name=cost][value=params]").check()
    page.wait_for_function("document.querySelector('#pareto .xtitle').textContent.startsWith('parameters')")
    if len(found.qualities) > 1:
        page.locator("input[name=quality][value=saliency]").check()
        page.wait_for_function("document.querySelector('#better').textContent.startsWith('Down')")
    page.locator("#table-results th button").nth(2).click()
    first = page.locator("#table-results tbody tr").first.locator("td").first.inner_text()
    assert first.strip() == found.results[0].name
    assert page.evaluate("window.attacked") is None
    axe = Axe().run(page, context={"exclude": [".main-svg"]}).response["violations"]
    assert [rule["id"] for rule in axe if rule["impact"] in ("serious", "critical")] == []
    context.close()
    assert wrong == []
