"""What one rank does for all: writing files, deciding, preparing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process is the one that writes files that all ranks share."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Run the block on the first rank, then on the others, which find what it left."""
    if not is_first():
        wait_for_all()
    try:
        yield
    finally:
        if is_first():
            wait_for_all()


def of_first(value: T) -> T:
    """The first rank's value, on every rank."""
    if not torch.distributed.is_initialized():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def only_first(do: Callable[[], None]) -> None:
    """Run something on the first rank while the others wait."""
    if is_first():
        do()
    wait_for_all()


def sum_of_all(numbers: list[int], device: torch.device) -> list[int]:
    """The sums over all ranks, which must all call it."""
    if not torch.distributed.is_initialized():
        return numbers
    sums = torch.tensor(numbers, device=device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def of_all(values: list[T]) -> list[T]:
    """The values of all ranks, one rank's after the other's; all ranks must call it."""
    if not torch.distributed.is_initialized():
        return values
    found: list[list[T]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(found, values)
    return [value for own in found for value in own]
