"""The steps at which callbacks log (`trainer.log_every_n_steps`), and the sum over ranks of what they log."""

from __future__ import annotations

from lightning import Trainer
from torch import Tensor, distributed


def ends_step(trainer: Trainer) -> bool:
    """Return True for the last micro-batch of an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


def is_logged(trainer: Trainer) -> bool:
    """Return True for a step that Lightning logs; the last step of a run too, once it is known to be the last."""
    return trainer._logger_connector.should_update_logs


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values` over ranks in place, in one collective; Lightning's `reduce` adds a barrier."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values
