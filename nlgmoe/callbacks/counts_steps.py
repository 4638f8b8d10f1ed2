"""A callback that counts micro-batches."""

from __future__ import annotations

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.module import MoEGPTModule


class CountsSteps(Callback):
    """Counts each micro-batch at its end."""

    def __init__(self) -> None:
        self._tokens_before = self._lengths_before = 0  # as the micro-batch began
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
            self.begin_run()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start the clock of a micro-batch."""
        assert isinstance(pl_module, MoEGPTModule)
        self._tokens_before, self._lengths_before = pl_module.tokens_fed, pl_module.lengths_fed
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count it."""
        assert isinstance(pl_module, MoEGPTModule)
        seconds = time.perf_counter() - self._started
        tokens, lengths = pl_module.tokens_fed - self._tokens_before, pl_module.lengths_fed - self._lengths_before
        self.count(trainer, pl_module, tokens, lengths, seconds)
