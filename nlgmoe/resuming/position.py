"""Position of a run: its last optimizer step, and what was done of it. A checkpoint holds it, and a resumed run does the rest."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_warn

from nlgmoe.resuming.checks import warn_of_repeated_data
from nlgmoe.resuming.keepers import (
    follow_moved_folder,
    keep_patience,
    keepers_behind_writer,
    monitored,
    saves_by_steps,
    set_saved_step,
    stopped_early,
    validate_now,
)
from nlgmoe.resuming.loops import set_loop_counters, was_validated


class Position:
    """The position of a fit. Steps are numbers of optimizer steps taken; 0: none yet.

    Callbacks see a step, then its validation, one after the other; a `ModelCheckpoint` among them may save, and a kill may leave
    out those behind it.

    Attributes:
        saved: step of the checkpoint that the fit has last saved, or loaded, to resume from.
        validated: step of the latest validation.
        step_seen: latest step that all callbacks have seen.
        validation_seen: step of the latest validation that all callbacks have seen.
        validation_due: whether a validation follows the last step.
        at_end: whether the fit began at the end of the run.
    """

    def __init__(self) -> None:
        self.saved = 0
        self.validated = 0
        self.step_seen = 0
        self.validation_seen = 0
        self.validation_due = False
        self.at_end = False
        # Of a resumed run, until it begins
        self._validates_first = False
        self._missed_step: list[ModelCheckpoint] = []
        self._missed_validation: list[ModelCheckpoint] = []
        self._monitored: dict[str, float] = {}  # training metrics of the last step
        self._max_steps: int | None = None  # where the run has taken so many

    def save(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Add the position to Lightning's dictionary, and set its loops to the last optimizer step."""
        step = checkpoint["global_step"]
        if "optimizer_states" in checkpoint:
            self.saved = step
        checkpoint["monitored"] = monitored(trainer)
        if step == 0:
            del checkpoint["loops"]  # nothing has been trained on: to resume is to start
            return
        validated = self.validated == step
        checkpoint["validation_due"] = self.validation_due and not validated
        checkpoint["step_unseen"] = self.step_seen != step
        checkpoint["validation_unseen"] = validated and self.validation_seen != step
        set_loop_counters(checkpoint, trainer.accumulate_grad_batches, validated)

    def load(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Take the position from Lightning's dictionary before the trainer does, and adapt its callbacks' states to the run."""
        self.saved = step = checkpoint["global_step"]
        behind = keepers_behind_writer(checkpoint, trainer)
        self._missed_step = [one for one in behind if saves_by_steps(one) and checkpoint.get("step_unseen")]
        set_saved_step(trainer, step, self._missed_step)
        keep_patience(checkpoint, trainer)
        follow_moved_folder(checkpoint, trainer)
        if "loops" not in checkpoint:
            return
        validated = was_validated(checkpoint)
        self._missed_validation = [
            one for one in behind if not saves_by_steps(one) and checkpoint.get("validation_unseen")
        ]
        self.validation_due = checkpoint.get("validation_due", False)
        self._validates_first = self.validation_due or bool(self._missed_validation)
        self._monitored = checkpoint.get("monitored", {})
        self.validated = step if validated else 0
        self.step_seen = 0 if self._missed_step else step
        self.validation_seen = 0 if self._missed_validation else self.validated
        # A step may have more or fewer micro-batches from here on. Where the checkpoint says if a validation was due,
        # Lightning's loop runs none: at the end of an epoch it looks at the wrong epoch and batch.
        set_loop_counters(checkpoint, trainer.accumulate_grad_batches, validated or "validation_due" in checkpoint)
        if 0 <= trainer.max_steps <= step:
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = -1  # else Lightning ends before `on_train_start`

    def begin(self, trainer: Trainer, module: LightningModule, tokens: int, train_tokens: int | None) -> None:
        """Do what a resumed run had left of its last step. A run that is resumed at its end is validated again, and stops.

        Args:
            trainer: of the fit, in `on_train_start`.
            module: that it trains.
            tokens: that the run has seen.
            train_tokens: at which it ends; None: never.
        """
        end = self._end(trainer, tokens, train_tokens)
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self._max_steps
            self._max_steps = None  # it may be raised before the next fit
        metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in self._monitored.items()}
        trainer._logger_connector._callback_metrics.update(metrics)
        self.at_end = end is not None
        if end is not None:
            rank_zero_warn(f"the run is at its end: {end}")
            trainer.should_stop = True
        elif trainer.ckpt_path is not None:
            warn_of_repeated_data(trainer)
        for one in self._missed_step:
            one.on_train_batch_end(trainer, module, None, None, 0)
        self.step_seen = trainer.global_step
        if end is not None or self._validates_first:
            validate_now(trainer, self.validated == trainer.global_step, self._missed_validation)
        self._validates_first, self._missed_step, self._missed_validation, self._monitored = False, [], [], {}

    def _end(self, trainer: Trainer, tokens: int, train_tokens: int | None) -> str | None:
        """Return which end the run stands at, and the remedy; None: it goes on."""
        if self._max_steps is not None:
            return f"it has taken trainer.max_steps={self._max_steps}; to go on, raise it"
        if train_tokens is not None and tokens >= train_tokens:
            return (
                f"{tokens} tokens of train_tokens={train_tokens}; to go on, raise model.train_tokens and "
                "model.schedule.decay_tokens"
            )
        if trainer.ckpt_path is None:
            return None
        for one in trainer.callbacks:  # type: ignore[attr-defined]
            # A timer looks before DeepSpeed's strategy loads its state.
            if isinstance(one, Timer) and one._duration is not None:
                one._check_time_remaining(trainer)
                if trainer.should_stop:
                    return "trainer.max_time is over; to go on, raise it"
        stopper = stopped_early(trainer)
        if stopper is not None:
            return (
                f"{type(stopper).__name__}, monitor={stopper.monitor}, ended it at step {trainer.global_step}; to go on, "
                "raise its patience if that ran out, or remove it from trainer.callbacks"
            )
        return None
