"""`last.ckpt`: where a run that has ended, or was told to, goes on from."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from typing_extensions import override

from nlgmoe.checkpoint.folder import read_document
from nlgmoe.resuming import stopped_early


class SaveAtEnd(Callback):
    """Saves `last.ckpt` at the end of training, if nothing has saved the last step.

    `ModelCheckpoint` leaves it out where the end is not the best (`monitor`) and no multiple of its interval; its `save_last` is
    the last time that it saved anything.
    """

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless checkpoints are turned off, or this only tries a few batches."""
        tried = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.checkpoint_callbacks and not tried and trainer.global_step > 0:
            # A checkpoint from before the last validation does not know that `EarlyStopping` ended the run there.
            save_last(trainer, anew=stopped_early(trainer) is not None)


def save_last(trainer: Trainer, anew: bool = False) -> Path:
    """Save `last.ckpt`, unless the run has a checkpoint of this step; every rank has to call this.

    Args:
        trainer: with a `ModelCheckpoint`, whose folder and `last.ckpt` these are.
        anew: save in any case.

    Returns:
        The checkpoint of this step.
    """
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    path = Path(trainer.default_root_dir, "checkpoints", "last.ckpt")
    if keepers:
        assert keepers[0].dirpath is not None  # since setup
        path = Path(keepers[0].last_model_path or Path(keepers[0].dirpath, "last.ckpt"))
    saved = [
        Path(keeper._last_checkpoint_saved)
        for keeper in keepers
        if keeper._last_global_step_saved == trainer.global_step and not keeper.save_weights_only
    ]
    there = _step_of(path) == trainer.global_step or bool(saved and not path.exists())
    if not anew and trainer.strategy.broadcast(there):
        return saved[0] if saved else path
    if keepers and keepers[0].save_last:
        keepers[0].last_model_path = str(path)  # so that the resumed run replaces it, in place of adding another
    trainer.save_checkpoint(path, weights_only=False)  # said, so that Lightning does not remark on its default
    return path


def _step_of(path: Path) -> int | None:
    try:
        document = read_document(path)
    except (ValueError, OSError):
        return None
    return document["global_step"] if "optimizer_groups" in document else None
