"""A callback that counts micro-batches, each once, in checkpoints of other callbacks too."""

from __future__ import annotations

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.module import MoEGPTModule


class CountsSteps(Callback):
    """Counts each micro-batch at its end, or in a checkpoint that a callback before this one saves of the step that it ends."""

    def __init__(self) -> None:
        self._batch: Batch | None = None  # not counted yet
        self._global_step = self._tokens_before = 0  # as it began
        self._started = 0.0
        self.begin_run()

    def begin_run(self) -> None:
        """Forget an earlier run, or one that was evaluated; `load_state_dict` restores a resumed one after this."""
        raise NotImplementedError

    def count(self, trainer: Trainer, module: MoEGPTModule, batch: Batch, tokens: int, seconds: float) -> None:
        """Add a micro-batch.

        Args:
            trainer: of the fit.
            module: that it trains.
            batch: of this rank.
            tokens: positions fed, over all ranks, after truncation by a curriculum.
            seconds: since it began.
        """
        raise NotImplementedError

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run."""
        if stage == "fit":
            self._batch = None
            self.begin_run()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start the clock of a micro-batch."""
        assert isinstance(pl_module, MoEGPTModule)
        self._batch, self._global_step, self._tokens_before = batch, trainer.global_step, pl_module.tokens_fed
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count it."""
        self._count_once(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count it in this checkpoint, whose step it has ended."""
        if self._batch is not None and trainer.global_step > self._global_step and "callbacks" in checkpoint:
            self._count_once(trainer, pl_module)
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def _count_once(self, trainer: Trainer, module: LightningModule) -> None:
        if self._batch is None:
            return
        assert isinstance(module, MoEGPTModule)
        seconds = time.perf_counter() - self._started
        batch, self._batch = self._batch, None
        self.count(trainer, module, batch, module.tokens_fed - self._tokens_before, seconds)
