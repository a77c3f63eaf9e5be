"""What every command begins with: options → device, network, batches of images; and refusals of files.

No command is here, and nothing that only one of them needs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from archscan import saving
from archscan.data import ImageSet
from archscan.errors import BadInput
from archscan.options import DataOptions, ModelOptions, ProgressFactory, RunOptions, SlimOptions, WidenOptions
from archscan.saved import is_saved, open_saved
from archscan.sources import Subject, open_subject
from archscan.stages import Stopwatch

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def refusing_bad_files(command: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Turn what the system says of a file (a name too long, no permission, no space) into a refusal."""

    @wraps(command)
    def run(*arguments: _Given.args, **keywords: _Given.kwargs) -> _Result:
        try:
            return command(*arguments, **keywords)
        except BrokenPipeError:  # says that nobody reads any more, and nothing of a file
            raise
        except OSError as error:
            name = str(error.filename or "a file")
            short = name if len(name) <= 80 else f"{name[:77]}…"
            raise BadInput(f"{short} cannot be used ({error.strerror or error}); give another") from error

    return run


@dataclass(frozen=True)
class Batches:
    """An image set as an iterable that knows its length and starts anew each time."""

    images: ImageSet

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels)."""
        return self.images.batches()

    def __len__(self) -> int:
        """Count the batches."""
        return -(-len(self.images) // self.images.batch_size)

    @property
    def is_synthetic(self) -> bool:
        """Whether the images are noise, of which no channel's silence says anything."""
        return self.images.is_synthetic


def use_machine(options: RunOptions) -> torch.device:
    """Set the number of threads and choose the device.

    Raises:
        BadInput: CUDA is asked for and there is none.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("there is no CUDA device that this PyTorch can use; pass --device cpu")
    use_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def open_timed(
    options: SlimOptions | WidenOptions, watch: Stopwatch, progress: ProgressFactory
) -> tuple[Subject, tuple[saving.Step, ...]]:
    """Open the network to make another one of, and read how it had come about where it is a saved result."""
    name = options.model.name
    with watch.stage("open"), progress(f"Opening {name}") as step:
        step(0, 0)
        subject = open_model(options.model, options.data, options.run.seed)
        return subject, saving.read_history(name) if is_saved(name) else ()


def open_model(model: ModelOptions, data: DataOptions | None = None, seed: int = 0) -> Subject:
    """Open a network by what was asked for.

    Args:
        model: Which one, with which weights.
        data: Decides how images are scaled; None for the network's own way.
        seed: Of random weights.
    """
    data = data or DataOptions()
    return open_subject(
        model.name,
        weights=model.weights,
        input_size=model.input_size,
        num_classes=model.num_classes,
        mean=data.mean,
        std=data.std,
        seed=seed,
        open_saved=open_saved,
    )
