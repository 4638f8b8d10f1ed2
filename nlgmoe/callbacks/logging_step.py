"""When callbacks log: at the end of an optimizer step, every `trainer.log_every_n_steps`."""

from __future__ import annotations

from lightning import Trainer


def ends_step(trainer: Trainer) -> bool:
    """Whether the micro-batch at hand is the last of its optimizer step."""
    return not trainer.fit_loop._should_accumulate()


def is_logged(trainer: Trainer) -> bool:
    """Whether the step at hand is one that Lightning hands to the loggers; a run's last one too, once that is known."""
    return trainer._logger_connector.should_update_logs
