"""Checks of one slim network that the package does not make itself: price by two counters, a training step, saving.

Each returns what is wrong in one clause, empty where all is well. The decision that is not obvious: the training step
is taken in place, on networks that nobody needs afterwards, and without an optimiser's memory, so that the largest
networks fit; a parameter moves against the sign of its gradient, which is Adam's first step (Kingma & Ba 2015, with
epsilon 0).
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archscan import saving
from archscan.recipes import Recipe, seeded
from archscan.recount import einsum_macs
from archscan.verify import output_tensors

PRODUCTS = {"conv", "linear", "matmul", "bmm", "addmm", "einsum", "einsum_macs"}
"""What fvcore calls the operators that `FlopCounterMode` counts too, at two FLOPs for each multiply-accumulate."""

MISSED = {
    "aten::_convolution_mode": "a convolution padded by name",
    "aten::scaled_dot_product_attention": "scaled_dot_product_attention",
}
"""Functions with products that fvcore knows nothing of, by fvcore's name for them; the plan counts them."""

ROUNDING = 1e-6
"""Gradients smaller than this fraction of the largest are taken for rounding errors (float32)."""

STEP = 1e-2
TRAINING_SAMPLES = 4
"""Fewer, and a BatchNorm over maps of one pixel has no gradient but rounding errors."""

LARGE_MACS = 20_000_000_000
"""Networks that cost more per image take their training step on `LARGE_SAMPLES` images, whose maps are not tiny."""
LARGE_SAMPLES = 2

SHARED_MEMORY = Path("/dev/shm")  # results are written and read once, which no disk has to see
SMALL_BYTES = 1 << 30


def check_price(model: nn.Module, example: Tensor, planned_macs: int) -> tuple[dict[str, Any], str]:
    """Count a slim network by fvcore and by `FlopCounterMode`.

    What fvcore counts must be what the plan says, to the MAC; what it misses is listed, and the products among it must
    be what `FlopCounterMode` sees more of.

    Returns:
        The counts, and what disagrees.
    """
    from fvcore.nn import FlopCountAnalysis

    # The counter knows no fused attention of a CPU, but the products that it stands for.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    halves = {str(op): int(count) // 2 for op, count in counter.get_flop_counts()["Global"].items()}
    counts: dict[str, Any] = {"planned": planned_macs, "flop_counter": halves}
    analysis = FlopCountAnalysis(model, example)
    analysis.set_op_handle("aten::einsum", einsum_macs)  # fvcore rounds it to four digits
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    try:
        by_operator = {name: int(count) for name, count in analysis.by_operator().items()}
        skipped = dict(analysis.unsupported_ops())
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        counts["fvcore_cannot"] = str(error).strip().splitlines()[0][:120]
        return counts, "" if counts["flop_counter"] else "neither fvcore nor FlopCounterMode can count it"
    counts |= {
        "fvcore": sum(by_operator.values()),
        "missed": sorted(MISSED[name] for name in MISSED if name in skipped),
    }
    counts["skipped"] = skipped
    products = sum(count for name, count in by_operator.items() if name in PRODUCTS)
    counts["missed_macs"] = missed = sum(halves.values()) - products
    if missed < 0 or (missed and not counts["missed"]):
        return counts, f"FlopCounterMode counts {missed:,} MACs of products more than fvcore"
    if planned_macs - counts["fvcore"] != missed:
        return counts, (
            f"fvcore counts {counts['fvcore']:,} MACs and misses {missed:,} where the plan says {planned_macs:,}"
        )
    return counts, ""


@contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    """Switch off what drops at random: its draws depend on the width."""
    rates = [
        (module, name)
        for module in model.modules()
        for name in ("p", "drop_prob", "drop_rate")
        if isinstance(vars(module).get(name), float)
    ]
    before = [getattr(module, name) for module, name in rates]
    for module, name in rates:
        setattr(module, name, 0.0)
    yield
    for (module, name), rate in zip(rates, before, strict=True):
        setattr(module, name, rate)


def trained_by_a_step(model: nn.Module, example: Tensor, samples: int) -> dict[str, float]:
    """Take one training step of a network, in place and in float32; name what moved, with its largest gradient.

    What is exactly zero before is a masked slice, and does not count.
    """
    model.float().train()
    inputs = torch.randn(samples, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    with seeded(0), _no_dropout(model), torch.enable_grad():
        outputs = [tensor for tensor in output_tensors(model(inputs)) if tensor.requires_grad]
        torch.stack([tensor.square().mean() for tensor in outputs]).sum().backward()
    moved: dict[str, float] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            counted = gradient.masked_fill_(parameter == 0, 0.0)
            largest = float(torch.linalg.vector_norm(counted, ord=torch.inf)) if counted.numel() else 0.0
            before = parameter.clone()
            parameter.sub_(counted.sign_().mul_(STEP))
            if largest != 0 and not torch.equal(before, parameter):
                moved[name] = largest
    return moved


def check_training(pair: list[nn.Module], example: Tensor, macs: int) -> str:
    """Compare which parameters one training step moves, in the masked original and in the slim network.

    The masked original, because what is left of a layer may be dead at first. A gradient that is zero but for rounding
    (of a bias before a BatchNorm) may be exactly zero in one of the two.

    Args:
        pair: The slim network and the masked original; both are trained in place, and taken off the list by then.
        example: An input.
        macs: Of one image, in the original.
    """
    samples = TRAINING_SAMPLES if macs <= LARGE_MACS else LARGE_SAMPLES
    expected = trained_by_a_step(pair.pop(), example, samples)
    found = trained_by_a_step(pair.pop(), example, samples)
    if all(map(math.isfinite, expected.values())) and not all(map(math.isfinite, found.values())):
        return "a gradient of the training step is not finite"
    for these, those, what in (
        (expected, found, "leaves as it is {}, which it changed before"),
        (found, expected, "changes {}, which it did not change before"),
    ):
        noise = ROUNDING * max(these.values(), default=0.0)
        only = sorted(name for name in these.keys() - those.keys() if not these[name] <= noise)
        if only:
            return f"a training step {what.format(f'{len(only)} parameters, such as {only[0]}')}"
    return "" if expected else "a training step changes nothing"


def check_saving(
    original: nn.Module, slim: nn.Module, step: saving.Step, recipe: Recipe | None, example: Tensor
) -> str:
    """Save, load and compare the outputs bit by bit and the classes module by module.

    Args:
        original: What was slimmed.
        slim: What came of it.
        step: How.
        recipe: How to build the original; None where it has to be passed to who loads the result.
        example: An input.
    """
    size = sum(tensor.nbytes for tensor in slim.state_dict().values())
    fast = SHARED_MEMORY if SHARED_MEMORY.is_dir() and size < SMALL_BYTES else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        where = Path(folder) / "result"
        saving.save(where, slim, [step], recipe, {}, "")
        loaded = saving.load(where, model=None if recipe is not None else original)
    with torch.no_grad():
        pairs = zip(output_tensors(slim(example)), output_tensors(loaded(example)), strict=True)
        if not all(torch.equal(before, after) for before, after in pairs):
            return "the loaded network gives other outputs"
    classes = [[type(module) for module in each.modules()] for each in (original, loaded)]
    return "" if classes[0] == classes[1] else "the loaded network is of other classes"
