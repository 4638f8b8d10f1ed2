"""Callbacks that decide by scores or steps, `ModelCheckpoint` and `EarlyStopping`, in a resumed run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason


def keepers_behind_writer(checkpoint: dict[str, Any], trainer: Trainer) -> list[ModelCheckpoint]:
    """Return the `ModelCheckpoint` that come after the one that wrote a checkpoint; none if no one of the run has.

    They save one after the other, each with its own choice in its checkpoint already.

    Args:
        checkpoint: Lightning's dictionary, of the run that is resumed.
        trainer: of the fit.
    """
    keepers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    written = Path(checkpoint["path"]).parts[-2:]  # the run folder may have been moved
    for index, one in enumerate(keepers):
        state = checkpoint.get("callbacks", {}).get(one.state_key, {})
        paths = [*state.get("best_k_models", ()), state.get("best_model_path", ""), state.get("last_model_path", "")]
        if written in [Path(path).parts[-2:] for path in paths]:
            return keepers[index + 1 :]
    return []


def saves_by_steps(keeper: ModelCheckpoint) -> bool:
    """Return whether a `ModelCheckpoint` saves after training steps, not after validations."""
    return keeper._every_n_train_steps > 0 or keeper._train_time_interval is not None


def set_saved_step(trainer: Trainer, step: int, missed: Sequence[ModelCheckpoint] = ()) -> None:
    """Make `ModelCheckpoint` save steps after a resumed one that an earlier fit of the trainer has saved.

    The resumed step itself may be validated, and saved, once more, but not in the first micro-batch of the next step, where
    Lightning still counts it: a metric would be judged a second time.

    Args:
        trainer: of the fit.
        step: the resumed one.
        missed: those that had not seen the step.
    """
    for one in trainer.checkpoint_callbacks:
        if isinstance(one, ModelCheckpoint):
            one._last_global_step_saved = step if saves_by_steps(one) and one not in missed else 0
            one._last_checkpoint_saved = ""


def validate_now(trainer: Trainer, again: bool, missed: Sequence[Any] = ()) -> None:
    """Validate during a fit, as the training loop does, if validation is enabled.

    Args:
        trainer: of the fit.
        again: true if the callbacks that decide by scores have counted this validation already.
        missed: those of them that have not.
    """
    if trainer.enable_validation:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        # A `ModelCheckpoint` would delete its worst checkpoint to make room for one that it has.
        counted = [
            one
            for one in callbacks
            if isinstance(one, EarlyStopping) or (isinstance(one, ModelCheckpoint) and one.best_model_path)
        ]
        idle = [one for one in counted if again and one not in missed]
        for one in idle:  # in the trainer's list still: a checkpoint that another one saves here has their states too
            vars(one)["on_validation_end"] = _do_nothing
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.run()
        finally:
            for one in idle:
                del vars(one)["on_validation_end"]
        trainer.training = True


def _do_nothing(*_: Any) -> None:
    pass


def keep_patience(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Replace the saved `EarlyStopping.patience` by the configured one, before the checkpoint is loaded."""
    for one in trainer.early_stopping_callbacks:
        if one is not None and (state := checkpoint.get("callbacks", {}).get(one.state_key)):
            state["patience"] = one.patience


def follow_moved_folder(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Give `ModelCheckpoint` its scores back if its folder was moved: Lightning forgets them where `dirpath` has changed."""
    for one in trainer.checkpoint_callbacks:
        state = checkpoint.get("callbacks", {}).get(one.state_key)
        if not isinstance(one, ModelCheckpoint) or not state or state["dirpath"] is None:
            continue
        old, new = str(state["dirpath"]), str(one.dirpath)
        if old == new or not Path(state["best_model_path"].replace(old, new, 1)).exists():
            continue
        for key in ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = state[key].replace(old, new, 1)
        state["best_k_models"] = {path.replace(old, new, 1): score for path, score in state["best_k_models"].items()}


def forget_deferred_saves(trainer: Trainer) -> None:
    """Make `ModelCheckpoint` not save after the next validation what it could not save yet, its metric being unknown.

    Before the first step, whose number is a multiple of every interval, it would save a step that is none.
    """
    for one in trainer.checkpoint_callbacks:
        if isinstance(one, ModelCheckpoint):
            one._defer_save_until_validation = False


def monitored(trainer: Trainer) -> dict[str, float]:
    """Return the training metrics that callbacks monitor, which they read too if a resumed run begins with a validation."""
    keepers: list[Any] = [*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks]
    monitors = {getattr(one, "monitor", None) for one in keepers}
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name in monitors and not name.startswith("val/")
    }


def stopped_early(trainer: Trainer) -> EarlyStopping | None:
    """Return the callback that ended the run; None if there is none, or if its patience has been raised since."""
    for one in trainer.early_stopping_callbacks:
        if one is None or one.stopping_reason == EarlyStoppingReason.NOT_STOPPED:
            continue
        if one.stopping_reason != EarlyStoppingReason.PATIENCE_EXHAUSTED or one.wait_count >= one.patience:
            return one
    return None
