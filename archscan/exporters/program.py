"""``model.pt2``: the program of `torch.export`, saved, loaded and run again."""

from pathlib import Path

import torch

from archscan.exporters.checks import call, compare, quiet, refusing
from archscan.exporters.network import Checked, Network, count_parameters, entry_of
from archscan.report.model import Exported

FILE = "model.pt2"


def write_program(network: Network, folder: Path) -> Exported:
    """Write ``model.pt2``.

    Raises:
        BadInput: The network cannot be traced.
        RebuildMismatch: The file does not compute what the network computes.
    """
    program, path = network.program, folder / FILE
    example, program.example_inputs = program.example_inputs, None  # else a batch of images lies in the file
    is_dynamic = network.settings.batch_size is None
    try:
        with quiet(), refusing("pt2", is_dynamic=is_dynamic):
            torch.export.save(program, path)
            loaded = torch.export.load(path)
            module = loaded.module()
    finally:
        program.example_inputs = example
    with quiet(), refusing("pt2", is_dynamic=is_dynamic):
        agreement = compare(FILE, lambda inputs: call(module, inputs), network.trials)
    state = loaded.state_dict
    parameters = count_parameters(network, lambda name: tuple(state[name].shape) if name in state else None, FILE)
    by = f"torch.export.load of torch {torch.__version__}"
    return entry_of(network, path, Checked("pt2", parameters, len(loaded.graph.nodes), agreement, by))
