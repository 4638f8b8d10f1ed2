"""Output file of `train.py predict`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from typing_extensions import override


class PredictionFile(BasePredictionWriter):
    """Writes `predictions.safetensors` into the run folder: `losses` `[N, T]`, nats per token, 0 where masked.

    Rows are in the order of the data module's prediction windows. With several ranks, each writes its own shard, with its
    rank in the file name.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    @override
    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write the file."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = folder / f"predictions{rank}.safetensors"
        save_file({"losses": torch.cat([batch.float().cpu() for batch in predictions])}, path)
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors creates files with mode 600
        rank_zero_info(f"token losses written to {path}")
