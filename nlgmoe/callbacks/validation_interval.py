"""`trainer.val_check_interval` in optimizer steps."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class ValidationInterval(Callback):
    """Makes `trainer.val_check_interval` count optimizer steps, as `log_every_n_steps` and `every_n_train_steps` do.

    Lightning counts micro-batches: for a fixed global batch the interval would depend on the number of GPUs.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert steps to micro-batches in `val_check_batch`, which Lightning's loop reads."""
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_batch = trainer.val_check_interval * trainer.accumulate_grad_batches
