import copy

import networkx as nx
import pytest
import torch
from torch import nn

from archscan.capture import capture
from archscan.errors import BadInput, UnsupportedOp
from archscan.groups import channel_groups, couple, coupling_graph, freeze
from archscan.rebuild import rebuild
from tests.masked import masked, random_kept, randomised, removed_units
from tests.nets import CASES, INPUT, CodedTokens, CrossCovariance, Plain, Residual, Tokens

torch.manual_seed(0)


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request):
    torch.manual_seed(0)
    return CASES[request.param]


def live(coupling):
    return tuple(f"{group.name} {len(group.units)}x{group.steps}" for group in coupling.groups if group.frozen is None)


def test_finds_the_units_and_no_fewer(case):
    coupling = couple(case.make(), INPUT)
    assert live(coupling) == case.live
    assert bool(coupling.mixing) == case.mixing
    reasons = {group.frozen for group in coupling.groups if group.frozen}
    assert "network output" in reasons
    others = reasons - {"network input", "network output"}
    assert bool(others) == bool(case.frozen)
    assert all(any(reason.startswith(start) for start in case.frozen) for reason in others)


def test_units_are_numbered_without_gaps(case):
    coupling = couple(case.make(), INPUT)
    numbers = [unit for group in coupling.groups for fibre in group.units for unit in fibre]
    assert sorted(numbers) == list(range(coupling.unit_count))
    assert len({group.name for group in coupling.groups}) == len(coupling.groups)


@pytest.mark.parametrize("seed", range(4))
def test_slim_network_is_the_masked_original(case, seed):
    model = randomised(case.make(), seed)
    coupling = couple(model, INPUT.double())
    kept = random_kept(coupling, seed)
    slim = rebuild(model, INPUT.double(), coupling, kept).model.eval()
    x = torch.randn(3, *INPUT.shape[1:], dtype=torch.float64)
    with torch.no_grad():
        expected, actual = masked(model, coupling, kept)(x), slim(x)
    assert actual.shape == expected.shape
    if not case.mixing:
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        read = {int(unit) for consumer in coupling.consumers for unit in consumer.units}
        if removed_units(coupling, kept) & read:
            assert not torch.allclose(model(x), expected, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_predicted_sizes_are_those_of_the_slim_network(case, seed):
    model = case.make()
    coupling = couple(model, INPUT)
    kept = random_kept(coupling, seed)
    widths = [len(kept[group.name][0]) for group in coupling.groups]
    slim = rebuild(model, INPUT, coupling, kept).model
    for name, parameter in slim.named_parameters():
        assert tuple(parameter.shape) == tuple(size.at(widths) for size in coupling.parameters[name])
    graph = capture(slim, INPUT)
    if [node.op for node in graph.nodes] != [node.op for node in coupling.graph.nodes]:
        pytest.skip("one head that is left takes another way through a matrix product")
    for number, value in enumerate(graph.values):
        assert value.shape == tuple(size.at(widths) for size in coupling.sizes(number))


def test_gates_cover_every_live_unit_and_nothing_passed_through(case):
    coupling = couple(case.make(), INPUT)
    gated = {int(unit) for consumer in coupling.consumers for unit in consumer.units if unit >= 0}
    eval_units = {
        unit
        for group in coupling.groups
        if group.frozen is None and group.name != "aux"
        for fibre in group.units
        for unit in fibre
    }
    assert eval_units <= gated
    assert not any(consumer.module == "dw" and (consumer.units >= 0).any() for consumer in coupling.consumers)


def test_leaves_the_model_unchanged(case):
    model = case.make()
    state = copy.deepcopy(model.state_dict())
    model.train()
    random_state = torch.get_rng_state()
    couple(model, INPUT)
    assert torch.equal(random_state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not nn.modules.module._global_forward_pre_hooks


def test_an_op_without_a_rule_is_refused_by_name_and_place():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x @ x.transpose(2, 3))

    with pytest.raises(UnsupportedOp, match="linalg_inv_ex at odd"):
        couple(_Holder(Odd()), INPUT)


class _Holder(nn.Module):
    def __init__(self, odd):
        super().__init__()
        self.conv, self.odd = nn.Conv2d(3, 4, 3), odd

    def forward(self, x):
        return self.odd(self.conv(x))


def test_a_forward_that_reads_values_runs_on_real_tensors():
    class Reads(Plain):
        def forward(self, x):
            return super().forward(x * 2 if x.sum().item() > 0 else x)

    assert live(couple(Reads(), INPUT)) == CASES["plain"].live


def test_attention_between_activations_is_frozen_with_the_reason():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.q, self.k, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            tokens = self.conv(x).flatten(2).transpose(1, 2)
            scores = self.q(tokens) @ self.k(tokens).transpose(1, 2)
            return self.head((scores.softmax(-1) @ tokens).mean(1))

    groups = {group.name: group.frozen for group in channel_groups(Attention(), INPUT)}
    assert "contracted between activations" in groups["q"]


@pytest.mark.parametrize("tokens", [Tokens, CodedTokens])
def test_a_weight_that_is_repeated_for_each_sample_is_still_a_weight(tokens):
    coupling = couple(tokens(CrossCovariance()), INPUT)
    assert live(coupling) == CASES["cross-covariance"].live
    repeated = {number for node in coupling.graph.nodes if node.module == "attention.proj" for number in node.outputs}
    assert any(coupling.graph.values[number].shape == (2, 12, 16) for number in repeated)
    assert "attention.proj.weight" in {consumer.weight for consumer in coupling.consumers}


def test_a_buffer_that_samples_were_written_to_is_no_weight():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.key, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 6), nn.Linear(6, 5)
            self.register_buffer("memory", torch.zeros(6, 6))

        def forward(self, x):
            keys = self.key(self.conv(x).flatten(2).transpose(1, 2))
            self.memory.add_(x.mean())
            return self.head((keys @ self.memory).mean(1))

    groups = {group.name: group.frozen for group in channel_groups(Remembers(), INPUT)}
    assert groups["conv"] is None
    assert "contracted between activations" in groups["key"]


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_spectral_norm_is_frozen_with_the_reason(norm):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), norm(nn.Conv2d(8, 6, 3)), nn.Conv2d(6, 7, 1), nn.Conv2d(7, 5, 1))
    groups = {group.name: group.frozen for group in channel_groups(net, INPUT)}
    assert "a weight is computed from a product over its channels" in groups["0"]
    assert "a weight is computed from a product over its channels" in groups["1"]
    assert groups["2"] is None


def test_channels_that_only_go_together_are_frozen_with_the_reason():
    class Both(Plain):
        def __init__(self):
            super().__init__()
            self.two, self.conv1 = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 8, 1)

        def forward(self, x):
            x = self.two(x)
            return super().forward(x + x.flip(1))

    groups = {group.name: group.frozen for group in channel_groups(Both(), INPUT)}
    assert groups["two"] == "its channels could only go all together"
    assert groups["conv1"] is None


def test_statistics_over_channels_that_all_stay_do_not_mix():
    class Stays(Plain):
        def __init__(self):
            super().__init__()
            self.places, self.norm = nn.Parameter(torch.randn(12)), nn.LayerNorm(12)

        def forward(self, x):
            return super().forward(self.norm(x + self.places))

    assert couple(Stays(), INPUT).mixing == ()


def test_an_unlabelled_partner_of_the_same_extent_freezes():
    class Arange(Plain):
        def forward(self, x):
            x = self.bn1(self.conv1(x)) * torch.arange(8.0, device=x.device).view(1, -1, 1, 1)
            return self.fc(self.bn2(self.conv2(x)).mean((2, 3)))

    groups = {group.name: group.frozen for group in channel_groups(Arange(), INPUT)}
    assert "unlabelled" in groups["conv1"]
    assert groups["conv2"] is None


def test_wrong_input_is_refused():
    with pytest.raises(BadInput, match=r"cannot take an input of shape \(1, 4, 12, 12\)"):
        couple(Plain(), torch.zeros(1, 4, 12, 12))
    with pytest.raises(BadInput, match="no tensor"):
        couple(Plain(), {})


def test_dict_and_tuple_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, first, *, second):
            return {"out": (self.head(self.a(first) + self.b(second)),)}

    coupling = couple(Two(), {"first": INPUT, "second": INPUT})
    assert live(coupling) == ("a 1x8",)


def test_freeze_gives_the_reason_and_refuses_unknown_names():
    coupling = couple(Residual(), INPUT)
    frozen = freeze(coupling, {"conv1": "asked for"})
    assert {group.name: group.frozen for group in frozen.groups}["conv1"] == "asked for"
    assert {group.name: group.frozen for group in coupling.groups}["conv1"] is None
    with pytest.raises(BadInput, match="no channel group is called nowhere"):
        freeze(coupling, {"nowhere": "x"})


def test_coupling_graph_joins_groups_and_layers():
    graph = coupling_graph(couple(Residual(), INPUT))
    assert isinstance(graph, nx.MultiGraph)
    assert set(graph["group", "stem"]) == {("layer", name) for name in ("stem", "conv1", "conv2", "bn2", "fc")}
    assert graph.nodes["group", "stem"]["channels"] == 8
    roles = {data["role"] for _, _, data in graph.edges(("group", "stem"), data=True)}
    assert roles == {"out", "in", "affine"}
