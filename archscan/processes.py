"""The processes of one run: environment that ``torchrun`` sets → `Place`.

Without ``torchrun`` there is one process and nothing is set up. The decision that is not obvious: a process that
refuses something says so to the others wherever they meet next, so that all end with its sentence and none waits. Only
of one that died do the others see an exception of the transport, which is turned into a sentence too.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from archscan.errors import ArchscanError, BadInput, OtherEnded, said_once

_LONGEST_WAIT = timedelta(minutes=10)
_Value = TypeVar("_Value")
_LOST = ("connection closed", "connection reset", "gloo", "nccl", "broken pipe", "timed out")


@dataclass(frozen=True)
class _Refusal:
    """What a process ends with, in place of a value to share."""

    sentence: str


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

    def first(self, values: Tensor) -> Tensor:
        """Give the first process's tensor to all; the one passed stays as it is."""
        if self.count == 1:
            return values
        values = values.detach().clone(memory_format=torch.contiguous_format)
        distributed.broadcast(values, 0)
        return values

    def share(self, value: _Value) -> list[_Value]:
        """Give every process's value to all, in the order of the processes.

        Raises:
            OtherEnded: One of them is about to end, see `together`.
        """
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        for rank, each in enumerate(found):
            if isinstance(each, _Refusal) and not isinstance(value, _Refusal):
                raise OtherEnded(f"process {rank} of this run: {each.sentence}")
        return cast("list[_Value]", found)

    @contextmanager
    def together(self) -> Iterator[None]:
        """End all processes where one refuses something; they hear of it where they share next."""
        with said_once():
            try:
                yield
            except OtherEnded:
                raise
            except ArchscanError as error:
                self.share(_Refusal(str(error)))
                raise

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            self.sum(torch.zeros(1, device=self.device))


@contextmanager
def joined(device: torch.device, remedy: str = "start it again") -> Iterator[Place]:
    """Connect this process to the others that ``torchrun`` started, and part from them at the end.

    Args:
        device: Kind of device; with CUDA, each process on a machine has its own.
        remedy: What to do when another process is lost.

    Raises:
        BadInput: There are more processes than GPUs, or they cannot connect.
        OtherEnded: Another one ended.
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
        raise OtherEnded(
            f"another process of this run ended or cannot be reached ({_first_line(error)}); see what it wrote, and "
            f"{remedy}"
        ) from error
    finally:
        distributed.destroy_process_group()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
