"""Ranks end training after the same step: a callback that stops one rank alone would leave the others waiting in a collective."""

from __future__ import annotations

from datetime import timedelta

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

WAIT_SECONDS = 300.0  # ranks come here together but for what callbacks of one rank do after the step


def require_same_end(step: int) -> None:
    """Wait for the other ranks to end training after this step too; a rank that ends has to call this.

    Raises:
        ValueError: not all of them do.
    """
    if not distributed.is_initialized():
        return
    store, rank = _get_default_store(), distributed.get_rank()
    keys = [f"nlgmoe/ends after {step}/{other}" for other in range(distributed.get_world_size())]
    store.set(keys[rank], "")
    try:
        store.wait(keys, timedelta(seconds=WAIT_SECONDS))
    except distributed.DistStoreError as error:
        others = ", ".join(str(other) for other, key in enumerate(keys) if not store.check([key]))
        raise ValueError(
            f"rank {rank} ends training after step {step}, but not rank {others}: a callback that sets trainer.should_stop has "
            "to decide on all ranks alike; use trainer.should_stop = trainer.strategy.reduce_boolean_decision(..., all=False)"
        ) from error
