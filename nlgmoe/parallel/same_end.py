"""Check that all ranks end training after the same step; otherwise the others would wait in a collective."""

from __future__ import annotations

from datetime import timedelta

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

WAIT_SECONDS = 300.0  # longest that a callback of a single rank may run after the last step


def require_same_end(step: int) -> None:
    """Wait until all ranks have called this for `step`; every rank must call it when it ends training.

    Raises:
        ValueError: not all ranks do.
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
            f"rank {rank} ends training after step {step}, but not rank {others}: a callback must set trainer.should_stop on all "
            "ranks alike; use trainer.should_stop = trainer.strategy.reduce_boolean_decision(..., all=False)"
        ) from error
