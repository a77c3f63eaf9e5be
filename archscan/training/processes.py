"""The processes of one run: environment that ``torchrun`` sets → `Place`.

Without ``torchrun`` there is one process and nothing is set up. The decision that is not obvious: what the others see
when a process dies is an exception of the transport; it is turned into one sentence, since the cause is written by the
process that died.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from archscan.errors import BadInput

_LONGEST_WAIT = timedelta(minutes=10)
_LOST = ("connection closed", "connection reset", "gloo", "nccl", "broken pipe", "timed out")


@dataclass(frozen=True)
class Place:
    """Which process this is.

    Attributes:
        device: Where it computes.
        rank: Its number.
        count: How many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor up over all processes; shape and device stay."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            self.sum(torch.zeros(1, device=self.device))


def is_first() -> bool:
    """Say whether this process is the one that prints, before any connection is made."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined(device: torch.device) -> Iterator[Place]:
    """Connect this process to the others that ``torchrun`` started, and part from them at the end.

    Args:
        device: Kind of device; with CUDA, each process on a machine has its own.

    Raises:
        BadInput: There are more processes than GPUs, they cannot connect, or another one ended.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Place(device)
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise BadInput(f"process {local} of this machine has no GPU of its own; start one process per GPU")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if distributed.is_initialized():  # by the caller, who will also part
        yield Place(device, distributed.get_rank(), distributed.get_world_size())
        return
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"the processes cannot connect ({_first_line(error)}); start them with torchrun") from error
    try:
        yield Place(device, distributed.get_rank(), distributed.get_world_size())
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in _LOST):
            raise
        raise BadInput(
            f"another process of this run ended or cannot be reached ({_first_line(error)}); see what it wrote, and "
            "go on from the last epoch with --resume"
        ) from error
    finally:
        distributed.destroy_process_group()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
