"""`last.ckpt`: the checkpoint that a finished or stopped run resumes from."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from typing_extensions import override

from nlgmoe.checkpoint.folder import read_document
from nlgmoe.module import MoEGPTModule
from nlgmoe.resuming.keepers import stopped_early
from nlgmoe.resuming.position import Position


class SaveAtEnd(Callback):
    """Saves `last.ckpt` at the end of training, if no checkpoint of the last step exists.

    `ModelCheckpoint` does not save the last step if it is neither the best (`monitor`) nor a multiple of its interval; its
    `save_last` copies the latest checkpoint that it saved.
    """

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless checkpoints are disabled or `fast_dev_run` is set."""
        fast_dev_run = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.checkpoint_callbacks and not fast_dev_run and trainer.global_step > 0:
            # A checkpoint saved before the last validation lacks the state with which `EarlyStopping` ended the run.
            save_last(trainer, force=stopped_early(trainer) is not None)


def save_last(trainer: Trainer, force: bool = False) -> Path:
    """Save `last.ckpt`, unless this fit has saved or resumed a checkpoint of this step; a collective call.

    A run that was resumed from an earlier step may find the `last.ckpt` of its previous continuation.

    Args:
        trainer: its first `ModelCheckpoint`, preferably without `monitor`, determines the path of `last.ckpt`.
        force: save even if the step has a checkpoint.

    Returns:
        The checkpoint of this step.
    """
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    callbacks.sort(key=lambda callback: callback.monitor is not None)
    path = Path(trainer.default_root_dir, "checkpoints", "last.ckpt")
    if callbacks:
        assert callbacks[0].dirpath is not None  # since setup
        path = Path(callbacks[0].last_model_path or Path(callbacks[0].dirpath, "last.ckpt"))
    saved = [
        Path(callback._last_checkpoint_saved)
        for callback in callbacks
        if callback._last_global_step_saved == trainer.global_step
        and callback._last_checkpoint_saved  # "" where a resumed run has not saved
        and not callback.save_weights_only
    ]
    assert isinstance(trainer.lightning_module, MoEGPTModule)
    position = trainer.lightning_module.position
    exists = position.saved == trainer.global_step and (_is_of(path, position) or bool(saved and not path.exists()))
    if not force and trainer.strategy.broadcast(exists):
        return saved[0] if saved else path
    if callbacks and callbacks[0].save_last:
        callbacks[0].last_model_path = str(path)  # the resumed run replaces this file instead of adding another
    trainer.save_checkpoint(path, weights_only=False)  # explicit: Lightning warns about its default
    return path


def _is_of(path: Path, position: Position) -> bool:
    """Return whether a run can go on from a checkpoint, and it is of the last step, on this branch of the run."""
    try:
        document = read_document(path)
    except (ValueError, OSError):
        return False
    of_branch = document["global_step"] == position.saved and document.get("fit") == position.saved_by
    return of_branch and "optimizer_groups" in document
