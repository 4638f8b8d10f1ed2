"""`trainer.val_check_interval` in optimizer steps."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from nlgmoe.validation import require


class ValidationInterval(Callback):
    """Makes `trainer.val_check_interval` count optimizer steps, as `log_every_n_steps` and `every_n_train_steps` do.

    Lightning counts micro-batches: for a fixed global batch the interval would depend on the number of GPUs.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert steps to micro-batches in `val_check_batch`, which Lightning's loop reads.

        Raises:
            SettingError: an epoch ends before the first validation, as Lightning raises for micro-batches.
        """
        interval = trainer.val_check_interval
        if not isinstance(interval, int):
            return
        trainer.val_check_batch = batches = interval * trainer.accumulate_grad_batches
        if trainer.check_val_every_n_epoch is not None and trainer.enable_validation:
            require(
                batches <= trainer.num_training_batches,
                f"trainer.val_check_interval={interval} steps are {batches} micro-batches, and an epoch has "
                f"{trainer.num_training_batches}: no epoch would have a validation; lower it, or set "
                "trainer.check_val_every_n_epoch=null to count steps over epochs",
            )
