"""`trainer.val_check_interval` in optimizer steps."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class ValidationInterval(Callback):
    """Makes `trainer.val_check_interval` count optimizer steps, as `log_every_n_steps` and `every_n_train_steps` do.

    Lightning counts micro-batches, so that with a given global batch the interval would change with the number of GPUs.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Turn steps into micro-batches; Lightning has just copied the setting to where its loop reads it."""
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_batch = trainer.val_check_interval * trainer.accumulate_grad_batches
