"""When callbacks log, at the end of an optimizer step, every `trainer.log_every_n_steps`; and how ranks add up what they log."""

from __future__ import annotations

from lightning import Trainer
from torch import Tensor, distributed


def ends_step(trainer: Trainer) -> bool:
    """Whether the micro-batch at hand is the last of its optimizer step."""
    return not trainer.fit_loop._should_accumulate()


def is_logged(trainer: Trainer) -> bool:
    """Whether the step at hand is one that Lightning hands to the loggers; a run's last one too, once that is known."""
    return trainer._logger_connector.should_update_logs


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of every rank's `values`, overwritten; one collective, where Lightning's `reduce` has a barrier too."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values
