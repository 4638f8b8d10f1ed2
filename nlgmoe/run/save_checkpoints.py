"""SaveCheckpoints: the one callback that writes a run's checkpoints and ends it on signals.

    checkpoints/step-500.ckpt      written once, never replaced
    checkpoints/last.ckpt          link to the newest one
    checkpoints/best.ckpt          link to the one with the best validation

Step N is saved at whichever of these comes first: a validation starts, the next micro-batch starts, the epoch ends, training
ends. By then the row of step N is logged, every callback has processed the step, and none has begun the next one.
"""

import math
import time
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from typing_extensions import override

from nlgmoe.checkpoint import writing
from nlgmoe.checkpoint.run_checkpoints import checkpoint_path, saved_steps, set_link
from nlgmoe.lightning_state import ends_step, training_is_done
from nlgmoe.run.signals import StopOnSignal
from nlgmoe.validation import SettingError, require, require_above, require_at_least

_SAVE = 1  # request of a rank: save after this step; larger ones end the run


class SaveCheckpoints(StopOnSignal, Checkpoint):
    """Saves checkpoints of a run into `checkpoints/` of the run folder, and ends the run on a signal.

    The last step of a run is saved, and so is the step after which a signal ends it. See `StopOnSignal` for signals.

    Args:
        every_n_steps: optimizer steps between checkpoints; null: not by steps.
        minutes: minutes between checkpoints; null: not by time.
        keep: number of newest checkpoints to keep, beside the best one and milestones.
        milestones: optimizer steps between checkpoints that are always kept; null: none.
        monitor: metric of the best checkpoint, as a validation logs it; null: none is the best.
        mode: `min` if a lower value of the metric is better, `max` if a higher one is.
        save_before_validation: save every step that is validated, before its validation. If false, a signal during a validation
            takes effect at its end, and only steps that are saved anyway can be the best; for models whose checkpoint takes
            longer than a validation.
    """

    at_end = "saving"

    def __init__(
        self,
        every_n_steps: int | None = 1000,
        minutes: float | None = None,
        keep: int = 2,
        milestones: int | None = None,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        save_before_validation: bool = True,
    ) -> None:
        require(mode in ("min", "max"), f"mode={mode} must be min or max")
        self.every_n_steps, self.minutes, self.keep, self.milestones = every_n_steps, minutes, keep, milestones
        require_at_least(1, self, "every_n_steps", "keep", "milestones")
        require_above(0, self, "minutes")
        self.monitor, self.mode, self.save_before_validation = monitor, mode, save_before_validation
        self._folder = Path()
        self._best: tuple[int, float] | None = None  # step and score
        super().__init__()

    def _reset(self) -> None:
        super()._reset()
        self._unsaved: int | None = None  # the last step, unless it is saved
        # The starting step of a run that begins from the checkpoint of another; it is saved first.
        self._started_at = -1
        self._saved_at = 0.0

    @property
    def best_model_path(self) -> str:
        """Path of the best checkpoint; empty if there is none. Lightning reads it for `ckpt_path="best"`."""
        return "" if self._best is None else str(checkpoint_path(self._folder, self._best[0]))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._best is None else {"best_step": self._best[0], "best_score": self._best[1]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = (state_dict["best_step"], state_dict["best_score"]) if state_dict else None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move to the front: Lightning calls checkpoint callbacks last, after others have begun the next step."""
        if stage == "fit":
            self._folder, self._best = Path(trainer.default_root_dir), None
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            trainer.callbacks = [self, *(callback for callback in callbacks if callback is not self)]  # type: ignore[attr-defined]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rename damaged checkpoints of later steps, and note a starting step without a checkpoint in the folder."""
        super().on_train_start(trainer, pl_module)
        self._saved_at = time.monotonic()
        saved = trainer.strategy.broadcast(saved_steps(self._folder))
        if trainer.ckpt_path is None and saved:  # `RunTrainer` has checked it before
            problem = f"trainer.default_root_dir={self._folder} has checkpoints of a run"
            raise SettingError(f"{problem}; resume the newest, or choose another folder")
        if trainer.global_step not in (0, *saved):
            self._unsaved = self._started_at = trainer.global_step
        if self._best is not None and self._best[0] not in saved:
            self._best = None
        if trainer.is_global_zero:
            for step in saved:
                path = checkpoint_path(self._folder, step)
                if step > trainer.global_step:
                    writing.remove(path.with_name(f"{path.name}.damaged"))  # of an earlier start
                    path.rename(path.with_name(f"{path.name}.damaged"))
                    rank_zero_warn(f"{path} cannot be used: it is now {path.name}.damaged")
        if trainer.global_step in saved:
            self._tidy(trainer.global_step)  # a killed process may not have done it

    # ---- when a step is saved

    @override
    def _request(self) -> int:
        late = self.minutes is not None and time.monotonic() - self._saved_at >= 60 * self.minutes
        return super()._request() or (_SAVE if late else 0)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if ends_step(trainer):
            self._unsaved = trainer.global_step

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the step that is validated, and end the run here if ranks have agreed to."""
        if self._training:
            ends = trainer.should_stop or training_is_done(trainer)
            self._finish_step(trainer, save=self.save_before_validation or ends)

    @override
    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._training and self.save_before_validation and (agreed := self._agree(trainer)) > _SAVE:
            self._agreed = agreed
            self._finish_step(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._training:
            return
        self._agreed = max(self._agreed, self._agree(trainer))
        if self.monitor is not None and self._unsaved is None:
            self._compare(trainer, self.monitor)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_step(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_step(trainer, save=True)

    @override
    def _finish_step(self, trainer: Trainer, save: bool = False) -> None:
        """Save the last step if `save` is true or it is due, and end the run if ranks have agreed to. A collective."""
        agreed, self._agreed = self._agreed, 0
        step = self._unsaved
        if step is not None and (save or agreed or self._is_due(step) or step == self._started_at):
            self._save(trainer)
        if agreed > _SAVE:
            trainer.strategy.barrier("links")  # a launcher may kill rank 0 as soon as another rank exits
            self._end(trainer, agreed, str(checkpoint_path(self._folder, trainer.global_step)))

    def _is_due(self, step: int) -> bool:
        return any(interval is not None and step % interval == 0 for interval in (self.every_n_steps, self.milestones))

    # ---- saving

    def _save(self, trainer: Trainer) -> None:
        module: Any = trainer.lightning_module  # a `TrainingStep`
        module.clock.stop("data")  # a save is no waiting for data
        for logger in trainer.loggers:
            logger.save()  # the step's row is in the table before the checkpoint that counts it
        trainer.save_checkpoint(checkpoint_path(self._folder, trainer.global_step), weights_only=False)
        self._unsaved, self._saved_at = None, time.monotonic()
        self._tidy(trainer.global_step)

    def _compare(self, trainer: Trainer, monitor: str) -> None:
        metrics = trainer.callback_metrics
        if monitor not in metrics:
            known = ", ".join(sorted(metrics))
            raise SettingError(f"SaveCheckpoints.monitor={monitor} is not logged; set it to one of {known}, or to null")
        score = float(metrics[monitor])
        better = self._best is None or (score < self._best[1] if self.mode == "min" else score > self._best[1])
        if better and math.isfinite(score):
            self._best = trainer.global_step, score
            self._tidy(trainer.global_step)

    @rank_zero_only
    def _tidy(self, newest: int) -> None:
        best = None if self._best is None else self._best[0]
        set_link(self._folder, "last", newest)
        set_link(self._folder, "best", best)
        steps = saved_steps(self._folder)
        for step in steps[: -self.keep]:
            if step not in (newest, best) and not (self.milestones and step % self.milestones == 0):
                writing.remove(checkpoint_path(self._folder, step))
