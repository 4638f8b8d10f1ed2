"""Ranks that read or write a checkpoint together succeed or fail together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed


class AgreedError(ValueError):
    """An error that every rank raises alike; the first rank of each machine prints it (`cli/errors.py`)."""

    on_every_rank = True


@contextmanager
def all_or_none() -> Iterator[None]:
    """Go on only if no rank raised. Where there are ranks, every rank has to come here.

    Raises:
        AgreedError: a rank raised; all have its message, after its number where not all ranks say the same.
    """
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
        if message is not None:
            raise AgreedError(message if len(set(found)) == 1 else f"rank {rank}: {message}") from mine
