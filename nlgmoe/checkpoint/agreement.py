"""Raise errors on all ranks together, so that no rank waits in a collective for one that has failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from nlgmoe.validation import RunError, SettingError


class AllRanksError(RunError):
    """An error that every rank raises."""


class AllRanksSettingError(AllRanksError, SettingError):
    """A wrong setting that every rank finds."""


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise on every rank if the block raises on one. A collective: every rank must enter the block."""
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    if not distributed.is_initialized():
        if mine is not None:
            raise mine
        return
    found: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, None if mine is None else f"{mine}")
    for rank, message in enumerate(found):
        if message is None:
            continue
        if len(set(found)) > 1:
            raise AllRanksError(f"rank {rank}: {message}") from mine
        raise (AllRanksSettingError if isinstance(mine, SettingError) else AllRanksError)(message) from mine
