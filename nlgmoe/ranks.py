"""Collectives over all ranks: sums, means, rank 0's value, and errors that every rank raises.

Each function is the identity in a process without ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, distributed

from nlgmoe.validation import RunError, SettingError

T = TypeVar("T")


class AllRanksError(RunError):
    """An error that every rank raises."""


class AllRanksSettingError(AllRanksError, SettingError):
    """A wrong setting, raised on every rank."""


def of_rank_zero(value: T) -> T:
    """Return rank 0's value on every rank. A collective."""
    values = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(values)
    return values[0]


def gather(value: T) -> list[T]:
    """Return the value of every rank, in order, on every rank. A collective."""
    values = [value]
    if distributed.is_initialized():
        values *= distributed.get_world_size()
        distributed.all_gather_object(values, value)
    return values


def rank_and_ranks() -> tuple[int, int]:
    """Return the rank of this process, and the number of ranks."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise on every rank if the block raises on one. A collective: every rank must enter the block."""
    own_error: Exception | None = None
    try:
        yield
    except Exception as error:
        own_error = error
    if not distributed.is_initialized():
        if own_error is not None:
            raise own_error
        return
    errors = gather(None if own_error is None else (f"{own_error}", isinstance(own_error, SettingError)))
    for rank, found in enumerate(errors):
        if found is not None:
            message, is_setting = found
            kind = AllRanksSettingError if is_setting else AllRanksError
            raise kind(message if len({*errors}) == 1 else f"rank {rank}: {message}") from own_error


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values` over ranks in place, in one collective; Lightning's `reduce` adds a barrier."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average `value` over ranks, in place."""
    return sum_over_ranks(value).div_(distributed.get_world_size()) if distributed.is_initialized() else value
