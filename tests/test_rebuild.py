"""Cutting: what is left, which attributes follow, and that nothing else and nobody else is touched."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import archscan  # noqa: F401 - before anything that may import torchvision
from archscan.errors import BadInput, RebuildMismatch
from archscan.rebuild import apply, rebuild, surgery_for
from archscan.surgery import Cut, Surgery, named_tensors
from tests import hand_couplings as hand


@pytest.fixture(params=hand.EXACT, ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest) -> hand.Case:
    torch.manual_seed(0)
    return request.param()


def test_slim_network_runs_and_has_the_expected_parameters(case: hand.Case) -> None:
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept).model
    assert sum(parameter.numel() for parameter in slim.parameters()) == case.parameters
    assert slim.eval()(case.inputs).shape == case.model.eval()(case.inputs).shape
    assert [type(module) for module in slim.modules()] == [type(module) for module in case.model.modules()]


def test_slim_network_trains_at_once(case: hand.Case) -> None:
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept).model.train()
    slim(case.inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())


def test_original_is_untouched(case: hand.Case) -> None:
    before = {name: tensor.clone() for name, tensor in named_tensors(case.model)}
    attributes = {path: repr(module) for path, module in case.model.named_modules()}
    slim = apply(case.model, surgery_for(case.coupling, case.kept))
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(case.model))
    assert attributes == {path: repr(module) for path, module in case.model.named_modules()}


def test_attributes_equal_those_of_a_network_built_that_way(case: hand.Case) -> None:
    slim = apply(case.model, surgery_for(case.coupling, case.kept))
    for module in slim.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            fresh: nn.Module = type(module)(module.in_channels, module.out_channels, 1, groups=module.groups)
            assert fresh.weight.shape[:2] == module.weight.shape[:2]
        elif isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean)
        elif isinstance(module, nn.PReLU):
            assert module.num_parameters == len(module.weight)


def test_keeping_everything_cuts_nothing(case: hand.Case) -> None:
    everything = {group.name: tuple(tuple(range(group.steps)) for _ in group.units) for group in case.coupling.groups}
    assert surgery_for(case.coupling, everything) == Surgery({})


def test_surgery_survives_json(case: hand.Case) -> None:
    surgery = surgery_for(case.coupling, case.kept)
    assert Surgery.from_json(json.loads(json.dumps(surgery.to_json())), case.model) == surgery


def test_grouped_convolution_keeps_its_own_inputs_in_every_row() -> None:
    case = hand.grouped()
    surgery = surgery_for(case.coupling, case.kept)
    assert surgery.cuts["1.weight"] == (Cut(0, (0, 3, 5, 6)), Cut(1, ((0, 1, 3),) * 2 + ((1, 2, 3),) * 2))
    slim = apply(case.model, surgery)
    old, new = case.model[1].weight, slim[1].weight
    torch.testing.assert_close(new[2], old[5][[1, 2, 3]], rtol=0, atol=0)
    assert (slim[1].groups, slim[1].in_channels, slim[1].out_channels) == (2, 6, 4)


def test_removing_a_whole_group_removes_it_from_the_count() -> None:
    case = hand.whole_groups()
    conv = apply(case.model, surgery_for(case.coupling, case.kept))[1]
    assert (conv.groups, conv.in_channels, conv.out_channels) == (2, 4, 4)


def test_shared_parameters_stay_shared() -> None:
    case = hand.shared()
    slim = apply(case.model, surgery_for(case.coupling, case.kept))
    assert slim.again is slim.twice
    assert slim.other.weight is slim.act.weight
    assert slim.other.num_parameters == 3


def test_conflicting_cuts_of_a_shared_parameter_are_refused() -> None:
    cuts = {"act.weight": (Cut(0, (0, 1)),), "other.weight": (Cut(0, (1, 2)),)}
    with pytest.raises(RebuildMismatch, match="cut differently"):
        apply(hand.shared().model, Surgery(cuts))


def test_memory_format_dtype_and_requires_grad_are_kept_and_gradients_dropped() -> None:
    case = hand.chain()
    model = case.model.to(torch.float64).to(memory_format=torch.channels_last)
    model.second.weight.requires_grad_(False)
    model(case.inputs.double()).sum().backward()
    slim = apply(model, surgery_for(case.coupling, case.kept))
    assert slim.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert not slim.second.weight.requires_grad
    assert slim.first.weight.requires_grad
    assert all(parameter.grad is None and parameter.dtype == torch.float64 for parameter in slim.parameters())
    assert model.first.weight.grad is not None


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrized_weight_follows(wrap: object) -> None:
    conv = wrap(nn.Conv2d(3, 4, 1))
    names = [
        name for name, tensor in named_tensors(conv) if "original" in name or name == "bias" or name.endswith("_u")
    ]
    slim = apply(conv, Surgery({name: (Cut(0, (0, 2)),) for name in names}))
    assert slim.out_channels == 2
    assert slim(torch.randn(1, 3, 2, 2)).shape[1] == 2


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kept",
    [
        {"first": ((0, 2),)},
        {"first": ((0, 2),), "second": ((0,),), "third": ((0,),)},
        {"first": ((),), "second": ((0,),)},
        {"first": ((2, 0),), "second": ((0,),)},
        {"first": ((0, 0),), "second": ((0,),)},
        {"first": ((0, 6),), "second": ((0,),)},
        {"first": ((-1, 0),), "second": ((0,),)},
        {"first": ((0,), (0,)), "second": ((0,),)},
    ],
)
def test_kept_steps_that_do_not_fit_are_refused(kept: dict[str, tuple[tuple[int, ...], ...]]) -> None:
    with pytest.raises(BadInput, match=r"channel group '(first|second|third)'"):
        surgery_for(hand.chain().coupling, kept)


def test_frozen_group_must_be_kept() -> None:
    coupling = hand.coupling([hand.group("stem", range(4), frozen="network output")], {})
    assert surgery_for(coupling, {"stem": (tuple(range(4)),)}) == Surgery({})
    with pytest.raises(BadInput, match="frozen \\(network output\\)"):
        surgery_for(coupling, {"stem": ((0, 1),)})


def test_unbalanced_rows_are_refused() -> None:
    case = hand.grouped()
    flat = hand.coupling([hand.group("0", range(8)), hand.group("1", range(8, 16))], case.coupling.tensors)
    with pytest.raises(RebuildMismatch, match=r"1\.weight"):
        surgery_for(flat, {"0": ((0, 1, 2, 4),), "1": (tuple(range(8)),)})
    with pytest.raises(RebuildMismatch, match="must be equal"):
        apply(case.model, surgery_for(flat, {"0": (tuple(range(8)),), "1": ((0, 1, 2, 4),)}))


def test_surgery_for_another_model_is_refused() -> None:
    with pytest.raises(RebuildMismatch, match="no tensor 'nope'"):
        apply(hand.chain().model, Surgery({"nope": (Cut(0, (0,)),)}))


# --- JSON of unknown origin ------------------------------------------------------------------------------------------

GOOD = {"cuts": {"first.weight": [{"axis": 0, "kept": [[0, 2], [4, 5]]}]}, "attributes": {}}


def cut(**entry: object) -> dict[str, object]:
    return {"cuts": {"first.weight": [entry]}, "attributes": {}}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {"cuts": {}},
        {**GOOD, "more": 1},
        {"cuts": [], "attributes": {}},
        {"cuts": {"../first.weight": [{"axis": 0, "kept": [[0, 1]]}]}, "attributes": {}},
        {"cuts": {"first.weight": []}, "attributes": {}},
        {"cuts": {"first.weight": [GOOD["cuts"]["first.weight"][0]] * 2}, "attributes": {}},
        cut(axis=0),
        cut(axis=4, kept=[[0, 1]]),
        cut(axis=-1, kept=[[0, 1]]),
        cut(axis=True, kept=[[0, 1]]),
        cut(axis=0, kept=[]),
        cut(axis=0, kept=[[0, 7]]),
        cut(axis=0, kept=[[0, 10**30]]),
        cut(axis=0, kept=[[-1, 2]]),
        cut(axis=0, kept=[[2, 2]]),
        cut(axis=0, kept=[[3, 4], [0, 1]]),
        cut(axis=0, kept=[[0, 2], [1, 3]]),
        cut(axis=0, kept=[[0, 1.5]]),
        cut(axis=0, kept=[[False, True]]),
        cut(axis=0, kept=[0, 1]),
        cut(axis=0, rows=[[6, [[0, 1]]]]),
        cut(axis=1, rows=[[10**18, [[0, 1]]]]),
        cut(axis=1, rows=[[5, [[0, 1]]]]),
        cut(axis=1, rows=[[5, [[0, 1]]], [1, [[0, 2]]]]),
        cut(axis=1, rows=[]),
        {"cuts": {}, "attributes": {"nope": {"groups": 1}}},
        {"cuts": {}, "attributes": {"first": {"groups": 2}}},
        {"cuts": {}, "attributes": {"first": {"out_channels": -1}}},
        {"cuts": {}, "attributes": {"first": {"out_channels": 10**20}}},
        {"cuts": {}, "attributes": {"first": {"out_channels": [6]}}},
        {"cuts": {}, "attributes": {"first": {"out_channels": "6"}}},
        {"cuts": {}, "attributes": {"first": {"kernel_size": [1]}}},
        {"cuts": {}, "attributes": {"first": {"kernel_size": 3}}},
        {"cuts": {}, "attributes": {"first": {"training": False}}},
        {"cuts": {}, "attributes": {"first": {"forward": 0}}},
        {"cuts": {}, "attributes": {"first": {"__class__": 0}}},
        {"cuts": {}, "attributes": {"first": {"_version": 0}}},
        {"cuts": {}, "attributes": {"first": 3}},
    ],
)
def test_surgery_json_that_does_not_fit_is_refused(data: object) -> None:
    with pytest.raises(BadInput, match=r"the plan does not fit this model: .*; load the plan"):
        Surgery.from_json(data, hand.chain().model)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_cut_survives_json(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    model = nn.Linear(columns, rows)
    kept = sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
    width = data.draw(st.integers(1, columns))
    row = st.permutations(range(columns)).map(lambda order: tuple(sorted(order[:width])))
    surgery = Surgery({"weight": (Cut(0, tuple(kept)), Cut(1, tuple(data.draw(row) for _ in kept)))})
    assert Surgery.from_json(json.loads(json.dumps(surgery.to_json())), model) == surgery
    expected = np.stack(
        [
            model.weight.detach().numpy()[i, list(own)]
            for i, own in zip(kept, surgery.cuts["weight"][1].kept, strict=True)
        ]
    )
    np.testing.assert_array_equal(apply(model, surgery).weight.detach().numpy(), expected)
