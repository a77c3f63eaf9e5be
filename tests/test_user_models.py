"""Networks that nobody here wrote: each is slimmed and proven, or refused by name in one sentence.

What goes in and comes out, control flow on shapes, shared and computed weights, frozen statistics, dtypes and memory
formats, and what wraps a network.
"""

import warnings
from dataclasses import dataclass

import archscan  # isort: skip - before anything that imports torchvision

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.ops import FrozenBatchNorm2d

from archscan.errors import ArchscanError, BadInput, InfeasibleBudget, UnsupportedOp

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
DEPTH = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def chain(norm=nn.BatchNorm2d):
    """Two convolutions and a classifier; layers 0, 3 and 8 have weights."""
    body = (nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), norm(24), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))


class Base(nn.Module):
    """Layers for the forwards below."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.depth, self.head = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16, 5)

    def body(self, images):
        return F.relu(self.second(F.relu(self.first(images))))

    def logits(self, features):
        return self.head(features.mean((2, 3)))


class TwoInputs(Base):
    def forward(self, images, depth, scale=1.0, *, extra=None):
        return self.logits(self.second(F.relu(self.first(images) + scale * self.depth(depth))))


class DictOfBatch(Base):
    def forward(self, batch):
        features = self.body(batch["images"])
        return {"logits": self.logits(features), "maps": [features.mean(1), (features.amax((2, 3)),)], "classes": 5}


class PairOfImages(Base):
    def forward(self, pair):
        before, after = pair
        return self.logits(self.body(before) - self.body(after)), None


class ShapesDecide(Base):
    def forward(self, images):
        x = F.relu(self.first(images))
        while x.shape[-1] > 4:
            x = F.max_pool2d(F.relu(self.second(x)), 2)
        if x.size(1) % 2:
            raise RuntimeError("an odd number of channels")
        samples, channels, height, width = x.shape
        x = x.view(samples, 2, channels // 2, height, width).transpose(1, 2).reshape(samples, channels, height, width)
        return self.logits(x)


class ValuesDecide(Base):
    def forward(self, images):
        x = F.relu(self.first(images))
        if x.mean() > 100:
            x = 2 * x
        return self.logits(F.relu(self.second(x)))


@dataclass
class Scores:
    logits: torch.Tensor
    heat: torch.Tensor


class Dataclass(Base):
    def forward(self, images):
        features = self.body(images)
        return Scores(self.logits(features), features.mean(1))


class SharedWeight(Base):
    def __init__(self):
        super().__init__()
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.third.weight, self.third.bias = self.second.weight, self.second.bias

    def forward(self, images):
        return self.logits(F.relu(self.third(self.body(images))))


class Labelled(Base):
    def forward(self, images):
        with torch.profiler.record_function("body"):
            features = self.body(images)
        return self.logits(features)


class HalfInside(Base):
    def forward(self, images):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = self.body(images)
        return self.logits(features.float())


class Checkpointed(Base):
    def forward(self, images):
        return self.logits(torch.utils.checkpoint.checkpoint(self.body, images, use_reentrant=False))


class Remembers(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(16))
        self.last = None

    def forward(self, images):
        x = self.last = F.relu(self.first(images))
        self.calls += 1
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean((0, 2, 3))
        return self.logits(F.relu(self.second(x - self.average.view(1, -1, 1, 1))))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class UnitRows(nn.Module):
    def forward(self, weight):
        return weight / (weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-3)


def with_layers(change, layers=(0, 3, 8), **options):
    """Change layers of a chain by what torch.nn.utils offers."""
    model = chain()
    with warnings.catch_warnings(action="ignore"):  # the older of these functions are deprecated, and in wide use
        for layer in layers:
            change(model[layer], **options)
    return model


def parametrized(kind):
    model = chain()
    parametrize.register_parametrization(model[3], "weight", kind())
    return model


def frozen_norms():
    model = chain()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


def lazy(initialised):
    with warnings.catch_warnings(action="ignore"):  # lazy modules call themselves experimental
        model = nn.Sequential(nn.LazyConv2d(16, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(24, 3), nn.ReLU())
        model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5)])
        if initialised:
            model(IMAGES)
    return model


def hooked():
    model = chain()
    model[0].register_forward_hook(lambda _module, _args, output: 2 * output)
    return model


WORK = {
    "two inputs": (TwoInputs, (IMAGES, DEPTH)),
    "keywords": (TwoInputs, {"images": IMAGES, "depth": DEPTH, "scale": 0.5, "extra": None}),
    "a dict in, a nested dict out": (DictOfBatch, ({"images": IMAGES},)),
    "a tuple in, a tuple with None out": (PairOfImages, ((IMAGES, 2 * IMAGES),)),
    "a list in": (PairOfImages, ([IMAGES, 2 * IMAGES],)),
    "a dataclass out": (Dataclass, IMAGES),
    "control flow on shapes": (ShapesDecide, IMAGES),
    "control flow on values": (ValuesDecide, IMAGES),
    "a shared weight": (SharedWeight, IMAGES),
    "a label for the profiler": (Labelled, IMAGES),
    "autocast inside": (HalfInside, IMAGES),
    "checkpointed": (Checkpointed, IMAGES),
    "state that is rebound": (Remembers, IMAGES),
    "hooks": (hooked, IMAGES),
    "traced by fx": (lambda: torch.fx.symbolic_trace(chain()), IMAGES),
    "weight_norm, old": (lambda: with_layers(nn.utils.weight_norm), IMAGES),
    "weight_norm": (lambda: with_layers(parametrizations.weight_norm), IMAGES),
    "a parametrization of elements": (lambda: parametrized(Doubled), IMAGES),
    "a parametrization of rows": (lambda: parametrized(UnitRows), IMAGES),
    "pruned weights": (lambda: with_layers(prune.random_unstructured, (3,), name="weight", amount=0.3), IMAGES),
    "frozen BatchNorm of torchvision": (lambda: chain(FrozenBatchNorm2d), IMAGES),
    "BatchNorm without gradients": (frozen_norms, IMAGES),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(chain()), IMAGES),
    "lazy modules after a run": (lambda: lazy(True), IMAGES),
    "nothing requires gradients": (lambda: chain().requires_grad_(False), IMAGES),
    "bfloat16": (lambda: chain().bfloat16(), IMAGES.bfloat16()),
    "float16": (lambda: chain().half(), IMAGES.half()),
    "float64": (lambda: chain().double(), IMAGES.double()),
    "channels_last": (lambda: chain().to(memory_format=torch.channels_last), IMAGES),
}


def slimmed(make, inputs):
    torch.manual_seed(0)
    model = make()
    return model, archscan.slim(model, inputs, target_flops=0.6, criterion="magnitude")


def called(model, inputs):
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def kinds(model):
    return {name: (tensor.dtype, tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("name", WORK)
def test_it_works(name):
    make, inputs = WORK[name]
    model, result = slimmed(make, inputs)
    assert result.verification.passed
    assert result.verification.applicable
    assert result.plan.after.macs <= 0.6 * result.plan.before.macs
    if not isinstance(model, torch.fx.GraphModule):  # each of which has a class of its own
        assert [type(module) for module in result.model.modules()] == [type(module) for module in model.modules()]
    assert kinds(result.model) == kinds(model)
    before, after = called(model.eval(), inputs), called(result.model, inputs)
    assert type(after) is type(before)
    result.model.train()
    called(result.model, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_is_saved_in_another_dtype_loads_bit_by_bit(dtype, tmp_path):
    _, result = slimmed(lambda: chain().to(dtype), IMAGES.to(dtype))
    loaded = archscan.load(result.save(tmp_path / "slim"), model=chain())
    assert {tensor.dtype for tensor in loaded.parameters()} == {dtype}
    assert torch.equal(called(loaded, IMAGES.to(dtype)), called(result.model, IMAGES.to(dtype)))


def test_memory_format_stays():
    _, result = slimmed(*WORK["channels_last"])
    for layer in (0, 3):
        assert result.model[layer].weight.is_contiguous(memory_format=torch.channels_last)
        assert not result.model[layer].weight.is_contiguous()


def test_a_spectral_norm_keeps_its_layer_and_says_why():
    deep = nn.Sequential(*[nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(4)], nn.Conv2d(16, 5, 1))
    parametrizations.spectral_norm(deep[3])
    groups = {group.name: group.frozen for group in archscan.couple(deep, IMAGES).groups}
    assert groups["0"] is None
    assert groups["1"] is None
    assert "a weight is computed from a product over its channels" in groups["2"]
    assert "a weight is computed from a product over its channels" in groups["3"]


class Number(Base):
    def forward(self, images):
        return self.logits(self.body(images)).sum().item()


class OneByOne(Base):
    def forward(self, images):
        yield self.logits(self.body(images))


class Embedded(Base):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 16)

    def forward(self, images, words):
        return self.logits(self.body(images) * self.words(words)[:, :, None, None])


def made_in_inference_mode():
    with torch.inference_mode():
        return chain()


def half_double():
    model = chain()
    model[8].double()
    return model


def exported():
    return torch.export.export(chain().eval(), (IMAGES,)).module()


def quantized():
    from torch.ao.nn.quantized import dynamic

    model = chain()
    with warnings.catch_warnings(action="ignore"):  # torch.ao is deprecated, and in wide use
        model[8] = dynamic.Linear(24, 5)
    return model


REFUSED = {
    "DataParallel": (lambda: nn.DataParallel(chain()), IMAGES, BadInput, "the model is wrapped in DataParallel"),
    "DataParallel inside": (
        lambda: nn.Sequential(nn.DataParallel(chain()), nn.Linear(5, 5)),
        IMAGES,
        BadInput,
        "0 is wrapped in DataParallel, which spreads it over devices; pass the module inside it",
    ),
    "TorchScript inside": (
        lambda: nn.Sequential(torch.jit.trace(chain().eval(), IMAGES), nn.Linear(5, 5)),
        IMAGES,
        BadInput,
        "0 is TorchScript",
    ),
    "exported": (exported, IMAGES, BadInput, "a graph of ATen ops, as torch.export gives; pass the module it was"),
    "quantized": (
        quantized,
        IMAGES,
        BadInput,
        r"8 is quantized \(Linear\), and integers cannot be cut; slim the model",
    ),
    "lazy modules before a run": (lambda: lazy(False), IMAGES, BadInput, r"0 \(LazyConv2d\) is not initialised; run"),
    "inference tensors": (made_in_inference_mode, IMAGES, BadInput, "weight of 0 was made under torch.inference_mode"),
    "all layers spectrally normed": (
        lambda: with_layers(nn.utils.spectral_norm),
        IMAGES,
        InfeasibleBudget,
        "nothing of the MACs can be saved",
    ),
    "another dtype than the input's": (lambda: chain().bfloat16(), IMAGES, BadInput, "cannot take an input of shape"),
    "two dtypes that do not meet": (half_double, IMAGES, BadInput, "several dtypes"),
    "a sparse input": (chain, IMAGES.to_sparse(), BadInput, "holds a sparse tensor; pass dense ones"),
    "an input without a batch": (chain, IMAGES[0], BadInput, r"cannot take an input of shape \(3, 12, 12\)"),
    "a number out": (Number, IMAGES, BadInput, "the model returns no tensor but a float"),
    "a generator out": (OneByOne, IMAGES, BadInput, "the model returns no tensor but a generator"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit and torch.ao
def test_it_is_refused_by_name(name):
    make, inputs, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as refusal:
        slimmed(make, inputs)
    assert issubclass(kind, ArchscanError)
    assert "\n" not in str(refusal.value)


def test_an_embedding_is_refused_or_proven():
    inputs = (IMAGES, torch.tensor([1, 2]))
    try:
        _, result = slimmed(Embedded, inputs)
    except UnsupportedOp as refusal:
        assert "aten.embedding at words" in str(refusal)  # noqa: PT017
    else:
        assert result.verification.passed


FACTORY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3, stride=2))
        self.blocks = nn.ModuleDict({name: nn.Conv2d(16, 16, 3, padding=1) for name in ("a", "b")})
        self.order = ["a", "b", "a"]
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(16, 1, 1)) for _ in self.order])
        self.head = nn.Linear(16, num_classes)

    def forward(self, images, *, flip=False):
        x = self.stem(images)
        for name, scale in zip(self.order, self.scale):
            x = x + scale * torch.relu(self.blocks[name](x))
        if min(x.shape[2:]) > 64:
            x = x[..., ::2, ::2]
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def make(num_classes=7):
    return Net(num_classes)
"""


def test_a_users_file_is_slimmed_from_the_command_line(typed, tmp_path):
    (tmp_path / "net.py").write_text(FACTORY, encoding="utf-8")
    options = ("--criterion", "magnitude", "--target-flops", "0.6", "--input-size", "20", "--output", "out", "--quiet")
    ran = typed("net.py:make", *options)
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / "model.safetensors").is_file()
