"""The audit: measured loss changes against rebuilt networks, skipping, statistics, ranking, report and refusals."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

import archscan
from archscan import auditing, cli
from archscan.audit import (
    Ablation,
    Audit,
    AuditSettings,
    Losses,
    Prediction,
    agreement,
    audit,
    choose,
    choose_criterion,
    draw_sets,
    draw_units,
    measure,
    own_plan,
    rank,
    replay,
)
from archscan.audit.ablations import free_units
from archscan.audit.run import quadratic_form
from archscan.audit.summary import reliability_of, scale
from archscan.commands import audit as command
from archscan.criteria import score
from archscan.errors import ArchscanError, BadInput
from archscan.gate_statistics import GateStatistics
from archscan.groups import Coupling, couple
from archscan.losses import classification_loss
from archscan.options import AuditOptions, DataOptions, ModelOptions, OutputOptions, RunOptions, silent
from archscan.rebuild import rebuild
from archscan.reference_nets import cifar_resnet
from archscan.report.audit import AuditReport, Images, Interval, OwnPlan, cell, json_text, verdict
from archscan.report.audit_html import render_html
from archscan.report.audit_terminal import render_audit
from archscan.report.page import packed_plotly
from archscan.report.terminal import console
from tests import gate_nets
from tests.masked import Kept, randomised, removed_units
from tests.nets import CASES, INPUT

EXACT = ("plain", "no-batch-norm", "residual", "dense-concat", "depthwise", "padded-shortcut", "slice-add", "shared")
CLASSES = 5


def made(name: str) -> tuple[nn.Module, Coupling]:
    torch.manual_seed(0)
    model = CASES[name].make()
    return randomised(model), couple(model, INPUT)


def batches(count: int = 2, samples: int = 3, classes: int = CLASSES, side: int = 12) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(samples, 3, side, side, dtype=torch.float64, generator=draw),
            torch.randint(classes, (samples,), generator=draw),
        )
        for _ in range(count)
    ]


def without(coupling: Coupling, ablation: Ablation) -> Kept:
    return {
        group.name: tuple(
            tuple(step for step, unit in enumerate(fibre) if unit not in ablation.units) for fibre in group.units
        )
        for group in coupling.groups
    }


def mean_loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        losses = [len(labels) * float(classification_loss(model.eval(), (images, labels))) for images, labels in data]
    return sum(losses) / sum(len(labels) for _, labels in data)


# ---------------------------------------------------------------- the measurement


@pytest.mark.parametrize("name", EXACT)
def test_loss_change_is_that_of_the_rebuilt_network(name: str) -> None:
    model, coupling = made(name)
    ablations = draw_units(coupling, 5, 0) + draw_sets(coupling, 3, 0)
    data = [*batches(), *batches(1, 2)]  # batches of unequal size
    losses = measure(model, coupling, ablations, data, classification_loss)
    assert losses.samples == 8
    assert losses.skipped
    assert losses.dense == pytest.approx(mean_loss(model, data), abs=1e-12)
    for ablation, change in zip(ablations, losses.change_A, strict=True):
        slim = rebuild(model, INPUT.double(), coupling, without(coupling, ablation)).model
        assert change == pytest.approx(mean_loss(slim, data) - losses.dense, abs=1e-10)
    assert np.abs(losses.change_A).max() > 1e-4


@pytest.mark.parametrize("name", ["residual", "dense-concat", "slice-add", "shared"])
def test_skipping_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, coupling = made(name)
    ablations = draw_units(coupling, 10, 0)
    short = measure(model, coupling, ablations, batches(), classification_loss)
    monkeypatch.setattr(replay, "CACHE_BYTES", 0)
    full = measure(model, coupling, ablations, batches(), classification_loss)
    assert np.array_equal(short.ablated_AB, full.ablated_AB)


@pytest.mark.parametrize("case", [gate_nets.RESIDUAL, gate_nets.DENSE, gate_nets.CHAIN], ids=lambda case: case.name)
def test_skipping_survives_what_is_overwritten_in_place(case: gate_nets.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ablations = [Ablation("unit", (unit,), (0,)) for unit in range(case.coupling.unit_count)]
    data = batches(2, classes=gate_nets.CLASSES, side=8)
    model = case.model()
    short = measure(model, case.coupling, ablations, data, classification_loss)
    monkeypatch.setattr(replay, "CACHE_BYTES", 0)
    full = measure(model, case.coupling, ablations, data, classification_loss)
    assert short.skipped
    assert np.array_equal(short.ablated_AB, full.ablated_AB)


def test_what_comes_before_a_removal_is_not_run_again() -> None:
    model, coupling = made("plain")
    ran: list[str] = []
    for name in ("conv1", "conv2", "fc"):
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    forward = type(model.conv1).forward
    runs = dict.fromkeys(("conv1", "conv2", "fc"), 0)

    def counting(self: nn.Module, x: Tensor) -> Tensor:
        runs[next(name for name, module in model.named_modules() if module is self)] += 1
        return forward(self, x)  # type: ignore[arg-type]

    last = max(free_units(coupling))  # the units that fc reads
    ablations = [Ablation("unit", (unit,), (last,)) for unit in free_units(coupling)[last]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", counting)
        measure(model, coupling, ablations, batches(1), classification_loss)
    # Twice to keep outputs, and in full for the checked ones: 12 ablations, every one checked.
    assert len(ablations) == 12
    assert runs["conv1"] == 2 + 12
    assert "forward" not in model.conv1.__dict__


class Stashing(nn.Module):
    """Leaves something behind that is gone once it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.left = nn.Conv2d(3, 4, 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.left = 2.0
        return self.inner(x)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = Stashing(), nn.Conv2d(4, 6, 3), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))
        left, self.first.left = self.first.left, 1.0
        return x * left


def test_a_network_that_remembers_is_run_in_full() -> None:
    torch.manual_seed(0)
    model = Remembering().eval()
    coupling = couple(model, INPUT)
    model = model.double()
    ablations = draw_units(coupling, 10, 0)
    losses = measure(model, coupling, ablations, batches(), classification_loss)
    assert not losses.skipped
    for ablation, change in zip(ablations, losses.change_A, strict=True):
        slim = rebuild(model, INPUT.double(), coupling, without(coupling, ablation)).model
        assert change == pytest.approx(mean_loss(slim, batches()) - losses.dense, abs=1e-10)


def test_nothing_is_left_changed() -> None:
    model, coupling = made("residual")
    model.train()
    model.stem.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    keys = [set(module.__dict__) for module in model.modules()]
    state = torch.get_rng_state()
    measure(model, coupling, draw_units(coupling, 3, 0), batches(), classification_loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == training
    assert [set(module.__dict__) for module in model.modules()] == keys
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_measurements_that_cannot_be_made_are_refused() -> None:
    model, coupling = made("plain")
    unit = draw_units(coupling, 1, 0)
    with pytest.raises(BadInput, match="no held-out batch"):
        measure(model, coupling, unit, [], classification_loss)
    images, labels = batches(1)[0]
    with pytest.raises(BadInput, match=r"loss of held-out batch 1 is nan"):
        measure(model, coupling, unit, [(images * float("nan"), labels)], classification_loss)
    still = randomised(CASES["plain"].make())
    nn.init.zeros_(still.fc.weight)
    with pytest.raises(BadInput, match="changes the loss by the same amount"):
        audit(still, coupling, batches(1), batches(1), classification_loss, ("random",))
    with pytest.raises(BadInput, match="0 contractions"):
        measure(model, coupling, unit, batches(1), lambda _model, batch: batch[0].mean())


# ---------------------------------------------------------------- what is removed


def test_units_are_spread_over_groups_and_never_of_frozen_ones() -> None:
    coupling = couple(cifar_resnet(20), torch.zeros(1, 3, 32, 32))
    free = free_units(coupling)
    drawn = draw_units(coupling, 50, 3)
    assert drawn == draw_units(coupling, 50, 3) != draw_units(coupling, 50, 4)
    counts = [sum(ablation.groups == (number,) for ablation in drawn) for number in free]
    assert sum(counts) == 50
    assert max(counts) - min(counts) <= 1
    assert all(ablation.units[0] in free[ablation.groups[0]] for ablation in drawn)
    assert len({ablation.units for ablation in drawn}) == 50
    everything = draw_units(coupling, 10**6, 0)
    assert sorted(ablation.units[0] for ablation in everything) == sorted(
        unit for units in free.values() for unit in units
    )


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_sets_take_a_share_of_each_group(seed: int, count: int) -> None:
    coupling = COUPLED
    free = free_units(coupling)
    drawn = draw_sets(coupling, count, seed)
    assert len(drawn) == count
    for ablation in drawn:
        for number in ablation.groups:
            taken = len(set(ablation.units) & set(free[number]))
            assert 1 <= taken < len(free[number])
            assert taken <= max(2, round(0.3 * len(free[number])))
        assert sum(len(set(ablation.units) & set(free[number])) for number in ablation.groups) == len(ablation.units)
        assert (len(ablation.groups) == 1) == (ablation.kind == "set of one group")


COUPLED = made("residual")[1]


def test_own_plan_is_what_slimming_would_remove() -> None:
    torch.manual_seed(0)
    model = CASES["residual"].make()
    result = archscan.slim(model, INPUT, target_flops=0.7, data=float_batches(), criterion="obd")
    found = own_plan(result.analysis.coupling, result.saliency_U, 0.7, 0)
    assert found is not None
    assert set(found.units) == removed_units(result.analysis.coupling, dict(result.plan.kept))
    assert own_plan(COUPLED, np.ones(COUPLED.unit_count), 1e-6, 0) is None
    with pytest.raises(BadInput, match=r"archscan\.couple"):
        own_plan(gate_nets.CHAIN.coupling, np.ones(15), 0.5, 0)


def float_batches() -> list[tuple[Tensor, Tensor]]:
    return [(images.float(), labels) for images, labels in batches()]


def test_a_network_without_free_channels_is_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(BadInput, match="nothing to audit"):
        draw_units(couple(model, torch.zeros(1, 3)), 3, 0)


# ---------------------------------------------------------------- statistics


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=12))
def test_correlations_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, dtype=float).T
    for ours, theirs in ((agreement.pearson, stats.pearsonr), (agreement.spearman, stats.spearmanr)):
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            assert np.isnan(ours(x, y))
        else:
            assert float(ours(x, y)) == pytest.approx(theirs(x, y).statistic, abs=1e-9)
            assert float(ours(1e-200 * x, 1e200 * y)) == pytest.approx(float(ours(x, y)), abs=1e-9)


def test_bootstrap_is_reproducible_and_covers_the_value() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    first, again, other = (agreement.agreement(agreement.pearson, x, y, agreement.draws(60, s)) for s in (1, 1, 2))
    assert np.array_equal(first.replicates_R, again.replicates_R)
    assert first.bounds != other.bounds
    low, high = first.bounds
    assert low < first.value < high
    # Fisher's interval of the correlation of 60 Gaussian pairs
    expected = np.tanh(np.arctanh(first.value) + np.array([-1.96, 1.96]) / np.sqrt(57))
    assert (low, high) == pytest.approx(expected, abs=0.06)


def test_agreement_within_groups_ignores_what_groups_differ_in() -> None:
    group = np.repeat([0, 1, 2], 6)
    measured = np.tile(np.arange(6.0), 3)
    predicted = measured + 100 * group
    assert float(agreement.spearman(predicted, measured)) < 0.5
    assert agreement.agreement_within(agreement.spearman, predicted, measured, group, 0).value == pytest.approx(1)
    flat = agreement.agreement_within(agreement.spearman, 1.0 * group, measured, group, 0)
    assert flat.value == 0
    few = agreement.agreement_within(agreement.spearman, predicted[:2], measured[:2], group[:2], 0)
    assert np.isnan(few.value)


def test_reliability_knows_signal_from_noise() -> None:
    rng = np.random.default_rng(0)
    sizes = np.full(16, 32)
    truth = rng.normal(size=(400, 1))
    assert agreement.reliability(agreement.pearson, np.tile(truth, 16), sizes, 0) == pytest.approx(1)
    assert abs(agreement.reliability(agreement.pearson, rng.normal(size=(400, 16)), sizes, 0)) < 0.15
    noisy = truth + 4 * rng.normal(size=(400, 16))  # the mean of 16 has as much noise as there is signal
    assert agreement.reliability(agreement.pearson, noisy, sizes, 0) == pytest.approx(0.5, abs=0.08)
    assert np.isnan(agreement.reliability(agreement.pearson, truth, sizes[:1], 0))


def test_standard_error_is_that_of_a_mean() -> None:
    changes = np.random.default_rng(0).normal(size=(3, 8))
    expected = changes.std(1, ddof=1) / np.sqrt(8)
    assert agreement.standard_error(changes, np.full(8, 32)) == pytest.approx(expected)
    assert np.isnan(agreement.standard_error(changes[:, :1], np.array([32]))).all()


def test_scale_compares_groups() -> None:
    group = np.repeat([0, 1, 2], 2)
    measured = np.ones(6)
    ratio, spread = scale(3 * measured, measured, group)
    assert (ratio, spread) == pytest.approx((3, 1))
    ratio, spread = scale(10.0**group, measured, group)
    assert ratio == pytest.approx(37)
    assert spread == pytest.approx(82 / 2.8)  # between 10 and 100, over between 1 and 10
    assert scale(measured, -measured, group) == (None, None)


# ---------------------------------------------------------------- ranking


def an_audit(noise: float = 0.3) -> Audit:
    """An audit whose predictions are known: the truth, two noisy copies of it, chance, and a constant."""
    rng = np.random.default_rng(0)
    units = tuple(Ablation("unit", (number,), (number % 5,)) for number in range(40))
    sets = tuple(Ablation("set of one group", (number, number + 5), (number % 5,)) for number in range(20))
    drawn = units + sets
    truth_U = rng.lognormal(size=60)
    truth_A = np.array([truth_U[list(ablation.units)].sum() for ablation in drawn])

    def prediction(name: str, saliency_U: np.ndarray) -> Prediction:
        summed_A = np.array([saliency_U[list(ablation.units)].sum() for ablation in drawn])
        return Prediction(name, saliency_U, summed_A, None, (len(drawn),))

    predictions = (
        prediction("chance", rng.random(60)),
        prediction("constant", np.zeros(60)),
        prediction("near", truth_U * rng.lognormal(sigma=noise, size=60)),
        prediction("truth", truth_U),
        prediction("nearer", truth_U * rng.lognormal(sigma=0.02, size=60)),
    )
    ablated_AB = np.concatenate([truth_A, [1.0]])[:, None] + 2 + 0.01 * rng.normal(size=(61, 4))
    losses = Losses(np.array([8, 8, 8, 4]), np.full(4, 2.0), ablated_AB, True)
    measured = (*drawn, Ablation("own plan", (0, 1), (0, 1)))
    return Audit(AuditSettings(40, 20, (0.9,)), drawn, measured, losses, predictions, 32)


def test_the_best_prediction_wins_and_ties_are_named() -> None:
    rows = {row.name: row for row in rank(an_audit())}
    assert list(rows)[:2] in (["truth", "nearer"], ["nearer", "truth"])
    assert list(rows)[2] == "near"
    assert {name for name, row in rows.items() if row.tied} == {"truth", "nearer"}
    assert rows["truth"].units.pearson.value == pytest.approx(1, abs=0.01)
    assert rows["truth"].ratio == pytest.approx(1, abs=0.01)
    assert rows["constant"].score == 0
    assert rows["constant"].units.spearman.value is None
    assert rows["truth"].plans[0].loss_change == pytest.approx(1, abs=0.02)
    assert reliability_of(an_audit()).units_pearson == pytest.approx(1, abs=0.01)


def test_quadratic_form_is_that_of_the_dense_fisher() -> None:
    gradient_NU = np.random.default_rng(0).normal(size=(7, 5))
    fisher_UU = gradient_NU.T @ gradient_NU / 7
    ablations = [Ablation("unit", (3,), (0,)), Ablation("set of one group", (0, 2, 4), (0,))]
    statistics = GateStatistics(5, sample_gradient_NU=gradient_NU)
    expected = np.array([0.5 * fisher_UU[3, 3], 0.5 * fisher_UU[np.ix_([0, 2, 4], [0, 2, 4])].sum()])
    assert quadratic_form(statistics, ablations, linear=False) == pytest.approx(expected)
    mean_U = gradient_NU.mean(0)
    signed = expected - [mean_U[3], mean_U[[0, 2, 4]].sum()]
    assert quadratic_form(statistics, ablations, linear=True) == pytest.approx(signed)


def test_loss_change_is_exact_for_a_loss_that_is_what_it_expands() -> None:
    # L_n(z) = ½ (a_n + Σ_u g_nu (1 − z_u))² has gradient −g_nu a_n by 1 − z_u at z = 1, and with a_n = ±1 its
    # empirical Fisher is its Hessian: the expansion to second order is the whole loss.
    rng = np.random.default_rng(0)
    slopes_NU, target_N = rng.normal(size=(9, 4)), rng.choice([-1.0, 1.0], 9)
    statistics = GateStatistics(4, sample_gradient_NU=-slopes_NU * target_N[:, None])
    true_U = 0.5 * ((target_N[:, None] + slopes_NU) ** 2 - target_N[:, None] ** 2).mean(0)
    assert (true_U < 0).any()
    assert score("loss-change", statistics) == pytest.approx(np.maximum(true_U, 0))


def test_an_audit_measures_each_criterion_on_the_same_removals() -> None:
    model, coupling = made("plain")
    settings = AuditSettings(12, 6, (0.8,), 1)
    found = audit(model, coupling, batches(2), batches(2, 4), classification_loss, ("obd", "random"), settings=settings)
    again = audit(model, coupling, batches(2), batches(2, 4), classification_loss, ("obd",), settings=settings)
    assert [each.name for each in found.predictions] == ["obd", "random"]
    assert found.drawn == again.drawn
    assert np.array_equal(found.predictions[0].saliency_U, again.predictions[0].saliency_U)
    assert np.array_equal(found.losses.change_A[:18], again.losses.change_A[:18])
    assert found.samples == 6
    assert found.losses.samples == 8
    for each in found.predictions:
        assert each.own_plans[0] is not None
        assert found.measured[each.own_plans[0]] == own_plan(coupling, each.saliency_U, 0.8, 1)


def test_a_criterion_that_cannot_be_scored_is_left_out_of_all_and_refused_by_name() -> None:
    model, coupling = made("no-batch-norm")
    settings = AuditSettings(4, 3, ())
    found = audit(model, coupling, batches(1), batches(1), classification_loss, settings=settings)
    assert "bn-scale" in found.unscored
    assert "BatchNorm" in found.unscored["bn-scale"]
    assert {"obd", "random"} <= {each.name for each in found.predictions}
    with pytest.raises(BadInput, match="BatchNorm"):
        audit(model, coupling, batches(1), batches(1), classification_loss, ("bn-scale",), settings=settings)
    with pytest.raises(BadInput, match="did you mean obd"):
        audit(model, coupling, batches(1), batches(1), classification_loss, ("obdd",), settings=settings)


# ---------------------------------------------------------------- choice


def test_choosing_is_reproducible_and_says_what_it_did() -> None:
    model, coupling = made("plain")
    names = ("random", "obd", "taylor-fo")
    done: list[tuple[int, int]] = []
    choice = choose_criterion(
        model, coupling, batches(4), classification_loss, names, 0, lambda *step: done.append(step)
    )
    again = choose_criterion(model, coupling, batches(4), classification_loss, names, 0)
    assert replace(choice, seconds=0.0) == replace(again, seconds=0.0)
    assert {name for name, _ in choice.candidates} == set(names)
    assert choice.samples == 12
    assert done[-1][0] == done[-1][1]
    assert choice.name in choice.sentence()
    assert "12 images" in choice.sentence()
    second = replace(choice, name="b", score=0.5, tied=("a",))
    assert "is 0.50; a could not be told from the best by that, and their own plans" in second.sentence()
    assert "own plans" not in replace(choice, tied=()).sentence()


def test_of_those_that_tie_the_one_whose_own_plans_lose_least_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, coupling = made("plain")
    best, second, third, *_ = rank(an_audit())
    for losses, expected in (((2.0, 1.0, 0.0), second), ((1.0, 2.0, 0.0), best)):
        rows = [
            replace(row, plans=(OwnPlan(0.9, loss), OwnPlan(0.8, loss)))
            for row, loss in zip((best, second, third), losses, strict=True)
        ]
        monkeypatch.setattr(choose, "rank", lambda _found, rows=rows: rows)
        names = (third.name, best.name, second.name)
        monkeypatch.setattr(choose, "audit", lambda *_, **__: an_audit())
        choice = choose_criterion(model, coupling, batches(2), classification_loss, names)
        assert not third.tied
        assert (choice.name, choice.own_loss) == (expected.name, 1.0)


def test_a_tie_in_everything_goes_to_the_name_that_stands_first() -> None:
    model, coupling = made("plain")
    # The same ranking under two names: only the order of the names can tell them apart.
    for names in (("obd", "laplace-snr"), ("laplace-snr", "obd")):
        choice = choose_criterion(model, coupling, batches(4), classification_loss, names)
        assert choice.name == names[0]
        assert choice.tied == names[1:]


@pytest.mark.parametrize(
    ("names", "count", "words"),
    [((), 2, "no criterion to choose from"), (("obd",), 1, "one batch"), (("nothing",), 2, "no criterion is called")],
)
def test_choices_that_cannot_be_made_are_refused(names: tuple[str, ...], count: int, words: str) -> None:
    model, coupling = made("plain")
    with pytest.raises(BadInput, match=words):
        choose_criterion(model, coupling, batches(count), classification_loss, names)


# ---------------------------------------------------------------- report


@pytest.fixture(scope="module")
def report() -> AuditReport:
    model, coupling = made("plain")
    settings = AuditSettings(12, 6, (0.9, 0.8))
    found = audit(
        model, coupling, batches(2), batches(3), classification_loss, ("obd", "random", "magnitude"), settings=settings
    )
    described = auditing.report_of(found, coupling, "</script><b>net")
    return replace(
        described, held_out=Images("val", 9), calibration=Images("train", 6), command_line="archscan audit x"
    )


def test_json_holds_every_number(report: AuditReport) -> None:
    data = json.loads(json_text(report))
    assert data["winner"] == data["criteria"][0]["name"] == report.winner
    assert len(data["ablations"]) == 18
    assert all(len(row["predicted"]) == 18 for row in data["criteria"])
    assert data["ablations"][0]["loss_change"] == report.ablations[0].loss_change
    assert data["free_units"] == 20


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_fits_its_width(report: AuditReport, width: int) -> None:
    printer = console(width=width, colour=False)
    with printer.capture() as capture:
        printer.print(render_audit(report, Path("out")))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    for row in report.criteria:
        line = next(line for line in lines if re.match(rf" +{row.name}\b", line))
        assert f"{row.score:.2f}" in line
        assert cell(row.units.spearman) in line
        assert cell(row.sets.spearman) in line
    assert "audit.html" in lines[-2]


def test_page_is_self_contained_and_escapes_names(report: AuditReport) -> None:
    page = render_html(report)
    assert page == render_html(report)
    assert "<b>net" not in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert "connect-src" not in page
    assert "default-src 'none'" in page
    own = page.replace(packed_plotly(), "")
    assert len(page) - len(own) == len(packed_plotly())  # once, and in no other form
    assert len(own) < 100_000
    for row in report.criteria:
        assert f"<code>{row.name}</code>" in page
        assert f"<td>{cell(row.units.pearson)}</td>" in page


def test_verdict_is_honest_about_ties(report: AuditReport) -> None:
    first, second, third = report.criteria
    alone = replace(report, criteria=(first, replace(second, tied=False), replace(third, tied=False)))
    assert verdict(alone).endswith("ahead of the other 2.")
    one = replace(report, criteria=(first, replace(second, tied=True), replace(third, tied=False)))
    assert f"but {second.name} cannot be told from it" in verdict(one)
    both = replace(report, criteria=(first, replace(second, tied=True), replace(third, tied=True)))
    assert "none of the others can be told from it" in verdict(both)


def test_cells() -> None:
    assert cell(Interval(0.5, -0.25, 0.75)) == "0.50 [-.25 .75]"
    assert cell(Interval(1.0, 0.9, 1.0)) == "1.00 [.90 1.00]"
    assert cell(Interval(None, None, None)) == "-"


# ---------------------------------------------------------------- command


def digits(tmp_path: Path, **changes: object) -> AuditOptions:
    options = AuditOptions(
        ModelOptions("lenet5", "random"),
        DataOptions("digits", 32, batch_size=16),
        RunOptions(seed=1),
        OutputOptions(tmp_path / "out"),
        ("obd", "random"),
        units=4,
        sets=3,
        held_out=32,
    )
    return replace(options, **changes)  # type: ignore[arg-type]


def test_command_writes_an_audit(tmp_path: Path) -> None:
    saved = auditing.audit_command(digits(tmp_path), silent)
    assert sorted(path.name for path in saved.folder.iterdir()) == ["audit.html", "audit.json"]
    assert json.loads((saved.folder / "audit.json").read_text()) == saved.report.to_json()
    assert saved.report.calibration == Images("digits", 32)
    assert saved.report.held_out == Images("digits", 32)
    assert "random" in saved.report.warnings[0]
    again = auditing.audit_command(digits(tmp_path, output=OutputOptions(tmp_path / "out", overwrite=True)), silent)
    assert again.report.criteria == saved.report.criteria
    assert again.report.ablations == saved.report.ablations


REFUSED = {
    "noise": ({"data": DataOptions("synthetic")}, "no labels to measure a loss with"),
    "noise held out": ({"data": DataOptions("digits", eval_source="synthetic")}, "no labels to measure a loss with"),
    "other classes": ({"model": ModelOptions("lenet5", "random", num_classes=7)}, "10 classes and the model 7"),
    "unknown criterion": ({"criteria": ("magnitud",)}, "did you mean magnitude"),
    "too few images": ({"held_out": 5000}, "lower --samples or --held-out"),
    "no such data": ({"data": DataOptions("nowhere")}, "no folder or zip nowhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_sentence_and_write_nothing(name: str, tmp_path: Path) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(ArchscanError, match=words) as caught:
        auditing.audit_command(digits(tmp_path, **changes), silent)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_peoples_files_are_left_alone(tmp_path: Path, report: AuditReport) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(BadInput, match="--overwrite"):
        auditing.check_audit_folder(folder, overwrite=False)
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(BadInput, match=r"thesis\.tex, which no audit wrote"):
        auditing.write_audit(report, folder, overwrite=True)
    with pytest.raises(BadInput, match="is a file"):
        auditing.check_audit_folder(folder / "thesis.tex", overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_command_line_arrives() -> None:
    typed = (
        "net --weights w.safetensors --data d.zip --samples 64 --held-out 128 --eval-data v.zip --batch-size 8 "
        "--criterion obd,taylor-fo --units 30 --sets 9 --seed 3 --output out --overwrite --quiet --device cpu"
    )
    options = command.read_options(command.make_parser().parse_args(typed.split()), "line")
    assert options == AuditOptions(
        ModelOptions("net", "w.safetensors"),
        DataOptions("d.zip", 64, "v.zip", 8),
        RunOptions("cpu", None, 3),
        OutputOptions(Path("out"), overwrite=True, quiet=True),
        ("obd", "taylor-fo"),
        30,
        9,
        128,
        "line",
    )
    assert command.read_options(command.make_parser().parse_args(["net", "--data", "d"]), "").criteria is None


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("audit net", "required: --data"),
        ("audit net --data d --criterion obd,", "leaves a name out"),
        ("audit net --data d --criterion obd,obd", "twice"),
        ("audit net --data d --units 2", "3 are the least"),
        ("audit net --data d --sets 0", "at least 1"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(typed: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(typed.split()) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert words in streams.err
    assert streams.err.count("\n") == 1
