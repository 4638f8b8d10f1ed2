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
        self._counts = False  # a micro-batch that is not counted yet
        self._global_step = self._tokens_before = self._lengths_before = 0  # as it began
        self._started = 0.0
        self.begin_run()

    def begin_run(self) -> None:
        """Forget an earlier run, or one that was evaluated; `load_state_dict` restores a resumed one after this."""
        raise NotImplementedError

    def count(self, trainer: Trainer, module: MoEGPTModule, tokens: int, lengths: int, seconds: float) -> None:
        """Add a micro-batch.

        Args:
            trainer: of the fit.
            module: that it trains.
            tokens: positions fed, over all ranks, after truncation by a curriculum.
            lengths: sum over them of the lengths of their sequences.
            seconds: since it began.
        """
        raise NotImplementedError

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run."""
        if stage == "fit":
            self._counts = False
            self.begin_run()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start the clock of a micro-batch."""
        assert isinstance(pl_module, MoEGPTModule)
        self._counts, self._global_step = True, trainer.global_step
        self._tokens_before, self._lengths_before = pl_module.tokens_fed, pl_module.lengths_fed
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
        if self._counts and trainer.global_step > self._global_step and "callbacks" in checkpoint:
            self._count_once(trainer, pl_module)
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def _count_once(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._counts:
            return
        assert isinstance(module, MoEGPTModule)
        self._counts, seconds = False, time.perf_counter() - self._started
        tokens, lengths = module.tokens_fed - self._tokens_before, module.lengths_fed - self._lengths_before
        self.count(trainer, module, tokens, lengths, seconds)
