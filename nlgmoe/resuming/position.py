"""Position of a run: its last optimizer step, and what was done of it. A checkpoint holds it, and a resumed run does the rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from nlgmoe.resuming.branches import first_step_left
from nlgmoe.resuming.dataloaders import (
    batches_of_ended_epoch,
    problem_of_dataloader,
    require_whole_epochs,
    warn_of_dataloader,
    warn_of_repeated_data,
)
from nlgmoe.resuming.keepers import (
    follow_moved_folder,
    keep_own_best,
    keep_patience,
    monitored,
    saves_by_steps,
    set_saved_step,
    stopped_early,
)
from nlgmoe.resuming.loops import set_loop_counters, was_validated

# Hooks in which callbacks decide by a score or a number of steps
STEP, VALIDATION = "on_train_batch_end", "on_validation_end"


class Position:
    """The position of a fit. Steps are numbers of optimizer steps taken; 0: none yet.

    `ModelCheckpoint` and `EarlyStopping` see a step, then its validation, one after the other. One of them may save a checkpoint,
    and a kill may leave out those that come after it: a checkpoint names them, and a resumed run shows it to them.

    Attributes:
        saved: step of the checkpoint that the fit has last saved, or loaded, to resume from.
        fit: names the fit; a checkpoint has that of the one that saved it, None in 0.3.0.
        saved_by: the fit that saved the checkpoint of step `saved`.
        others_from: step from which files of the run folder are of branches that the resumed checkpoint is not of
            (`first_step_left`); None: the fit has resumed nothing.
        validated: step of the latest validation.
        validation_due: whether a validation follows the last step.
        at_end: whether the fit stands at the end of the run before its first step.
    """

    def __init__(self) -> None:
        self.saved = 0
        self.fit = uuid4().hex
        self.saved_by: str | None = None
        self.others_from: int | None = None
        self.validated = 0
        self.validation_due = False
        self.at_end = False
        self._seen: dict[str, set[str]] = {STEP: set(), VALIDATION: set()}  # state keys of callbacks, by the hook
        # Of a resumed run, until it begins
        self._validates_first = False
        self._missed: dict[str, list[Callback]] = {STEP: [], VALIDATION: []}
        self._idle: set[str] = set()  # state keys of callbacks that do not count a repeated validation again
        self._monitored: dict[str, float] = {}  # metrics of the last step and the latest validation
        self._other_steps = False  # the run had steps of more or fewer micro-batches
        self._of_dataloader: str | None = None  # a problem
        self._ended: int | None = None  # batches of the epoch that ended with the checkpoint
        self._max_steps: int | None = None  # where the run has taken so many
        self._began = 0  # step at which the fit began

    def take_step(self, validation_due: bool) -> None:
        """Note that a step was taken, before callbacks see it."""
        self.validation_due = validation_due
        self._seen[STEP] = set()

    def end_validation(self, trainer: Trainer) -> None:
        """Note that a validation of the fit has ended, before callbacks see it."""
        if _trains(trainer):
            self.validated = trainer.global_step
            self._seen[VALIDATION] = set(self._idle)

    def save(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Add the position to Lightning's dictionary, and set its loops to the last optimizer step."""
        step = checkpoint["global_step"]
        if "optimizer_states" in checkpoint:
            self.saved, self.saved_by = step, self.fit
        checkpoint["fit"] = self.fit
        checkpoint["monitored"] = monitored(trainer)
        if step == 0:
            del checkpoint["loops"]  # nothing has been trained on: to resume is to start
            return
        validated = self.validated == step
        checkpoint["validation_due"] = self.validation_due and not validated
        keys = {one.state_key for one in _deciding(trainer)}
        checkpoint["unseen"] = {
            STEP: dict.fromkeys(sorted(keys - self._seen[STEP]), True),
            VALIDATION: dict.fromkeys(sorted(keys - self._seen[VALIDATION]), True) if validated else {},
        }
        warn_of_dataloader(checkpoint, set_loop_counters(checkpoint, trainer.accumulate_grad_batches, validated))

    def load(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Take the position from Lightning's dictionary before the trainer does, and adapt its callbacks' states to the run."""
        self.saved = step = checkpoint["global_step"]
        self.saved_by = checkpoint.get("fit")
        self.others_from = first_step_left(Path(trainer.default_root_dir), checkpoint)
        self._guard_exceptions(trainer, step)
        self._other_steps, self._of_dataloader, self._ended = False, None, None
        unseen = checkpoint.get("unseen", {})
        for hook in (STEP, VALIDATION):
            self._missed[hook] = [
                one
                for one in _deciding(trainer)
                if one.state_key in unseen.get(hook, {}) and saves_by_steps(one) == (hook == STEP)
            ]
            self._seen[hook] = {one.state_key for one in _deciding(trainer) if one not in self._missed[hook]}
        set_saved_step(trainer, step, self._missed[STEP])
        keep_patience(checkpoint, trainer)
        follow_moved_folder(checkpoint, trainer)
        keep_own_best(checkpoint, trainer)
        if "loops" not in checkpoint:
            return
        self._of_dataloader = problem_of_dataloader(checkpoint, trainer.max_epochs)
        self._ended = batches_of_ended_epoch(checkpoint)
        validated = was_validated(checkpoint)
        self.validated = step if validated else 0
        self.validation_due = checkpoint.get("validation_due", False)
        self._validates_first = self.validation_due or bool(self._missed[VALIDATION])
        self._monitored = checkpoint.get("monitored", {})
        # A step may have more or fewer micro-batches from here on. Where the checkpoint says if a validation was due,
        # Lightning's loop runs none: at the end of an epoch it looks at the wrong epoch and batch.
        done = validated or "validation_due" in checkpoint
        self._other_steps = set_loop_counters(checkpoint, trainer.accumulate_grad_batches, done, saved=True) != 0
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

        Raises:
            SettingError: an epoch of data that have an end would not be gone over once.
        """
        self.fit = uuid4().hex
        if trainer.ckpt_path is None:
            self.others_from = None
        self._guard_exceptions(trainer, trainer.global_step)
        for one in _deciding(trainer):
            for hook in (STEP, VALIDATION):
                call = getattr(one, hook)
                if isinstance(call, partial) and getattr(call.func, "__func__", None) is Position._show:
                    call = call.args[2]  # of an earlier fit
                vars(one)[hook] = partial(self._show, one, hook, call)
        end = self._end(trainer, tokens, train_tokens)
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self._max_steps
            self._max_steps = None  # it may be raised before the next fit
        metrics = {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in self._monitored.items()
            if trainer.enable_validation or not name.startswith("val/")  # else it would be the result of the run
        }
        trainer._logger_connector._callback_metrics.update(metrics)
        if end is not None:
            rank_zero_warn(f"the run is at its end: {end}")
            trainer.should_stop = True
        else:
            require_whole_epochs(trainer, self._other_steps, self._of_dataloader, self._ended)
            if trainer.ckpt_path is not None:
                warn_of_repeated_data(trainer)
        for one in self._missed[STEP]:
            one.on_train_batch_end(trainer, module, None, None, 0)
        if (end is not None or self._validates_first) and trainer.enable_validation:
            self._validate(trainer)
        self.at_end = trainer.should_stop
        self._validates_first, self._missed, self._monitored = False, {STEP: [], VALIDATION: []}, {}

    def _validate(self, trainer: Trainer) -> None:
        """Validate as the training loop does; callbacks that have counted this validation already do not count it again."""
        if self.validated == trainer.global_step:
            # A `ModelCheckpoint` would delete its worst checkpoint to make room for one that it has.
            counted = [one for one in _deciding(trainer) if isinstance(one, EarlyStopping) or one.best_model_path]
            self._idle = {one.state_key for one in counted if one not in self._missed[VALIDATION]}
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.run()
        finally:
            self._idle = set()
        trainer.training = True

    def _show(self, callback: Callback, hook: str, call: Callable[..., None], trainer: Trainer, *args: Any) -> None:
        """Call a callback's hook, and note that it has seen the step or validation, which its state in a checkpoint then has."""
        if _trains(trainer):
            self._seen[hook].add(callback.state_key)
        if hook == STEP or callback.state_key not in self._idle:
            call(trainer, *args)

    def _guard_exceptions(self, trainer: Trainer, step: int) -> None:
        """Make `ModelCheckpoint.save_on_exception` save the weights of whole steps of this fit only, which begins at `step`.

        Without a step, as where the start is refused, the file name may be that of a best checkpoint of another branch.
        """
        self._began = step
        for one in trainer.checkpoint_callbacks:
            vars(one)["on_exception"] = partial(self._save_on_exception, one)

    def _save_on_exception(self, callback: Callback, trainer: Trainer, module: Any, exception: BaseException) -> None:
        fits = trainer.state.fn == TrainerFn.FITTING and getattr(module, "position", None) is self  # not a later fit
        whole = fits and trainer.global_step > self._began and not module.taking_step
        if whole and getattr(callback, "save_on_exception", False) and not module.has_other_weights():
            type(callback).on_exception(callback, trainer, module, exception)

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


def _trains(trainer: Trainer) -> bool:
    """Return whether this is a fit, in which a validation counts."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _deciding(trainer: Trainer) -> list[Any]:
    """Return the callbacks that decide by a score or a number of steps."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [one for one in callbacks if isinstance(one, EarlyStopping | ModelCheckpoint)]
