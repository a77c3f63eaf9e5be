"""``model.ts.pt``: TorchScript by tracing, saved, loaded and run again, for runtimes that take nothing newer.

Tracing keeps the one path that the example took. PyTorch calls TorchScript deprecated and warns; running the loaded
file on batches that were not traced says more than its warnings do. Unlike the other formats, this one names the source
files that it came from, which its error messages show.
"""

from pathlib import Path

import torch

from archscan.capture import split_input
from archscan.exporters.checks import call, compare, quiet, refusing
from archscan.exporters.network import Checked, Network, count_parameters, entry_of
from archscan.report.model import Exported

FILE = "model.ts.pt"


def write_script(network: Network, folder: Path) -> Exported:
    """Write ``model.ts.pt``.

    Raises:
        BadInput: The network cannot be traced.
        RebuildMismatch: The file does not compute what the network computes.
    """
    path = folder / FILE
    args, kwargs = split_input(network.example)
    given = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
    is_dynamic = network.settings.batch_size is None
    with quiet(), refusing("script", is_dynamic=is_dynamic), torch.no_grad():
        # not strict: outputs may be dicts; not checked by trace itself: that is done below, on other batches
        traced = torch.jit.trace(network.model, strict=False, check_trace=False, **given)
        torch.jit.save(traced, path)
        loaded = torch.jit.load(path)
        agreement = compare(FILE, lambda inputs: call(loaded, inputs), network.trials)
    state = {name: tuple(tensor.shape) for name, tensor in loaded.named_parameters(remove_duplicate=False)}
    parameters = count_parameters(network, state.get, FILE)
    nodes = sum(1 for _ in loaded.inlined_graph.nodes()) + sum(1 for _ in loaded.modules())
    by = f"torch.jit.load of torch {torch.__version__}"
    return entry_of(network, path, Checked("script", parameters, nodes, agreement, by))
