"""Output file of `train.py predict`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from typing_extensions import override

from nlgmoe.files import atomic_write


class PredictionFile(BasePredictionWriter):
    """Writes `predictions.safetensors` into the run folder: `losses` `[N, T]`, nats per token, 0 where masked; `windows` `[N]`.

    `windows` is the index of each row among the data module's prediction windows; it is absent for an iterable data set.
    With several ranks, each writes a file with its rank in the name; sorting all rows by `windows` restores the order of
    the data. Files of an earlier prediction on other ranks stay. The files' metadata name the `checkpoint` and its `step`.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")
        self._metadata: dict[str, str] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._metadata = {}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the checkpoint's path, even if a run folder was given."""
        self._metadata = {"checkpoint": checkpoint["path"], "step": str(checkpoint["global_step"])}

    @override
    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = folder / f"predictions{rank}.safetensors"
        windows = torch.tensor([index for loader in batch_indices for batch in loader for index in batch])
        losses = torch.cat([batch.float().cpu() for batch in predictions])
        written = {"losses": losses}
        if len(windows) == len(losses):  # data without a sampler have none
            real = windows >= 0  # ranks have equally many rows: the last ones may be padding
            written = {"losses": losses[real], "windows": windows[real]}
        with atomic_write(path) as temporary:
            save_file(written, temporary, self._metadata)
            temporary.chmod(folder.stat().st_mode & 0o666)  # safetensors creates files with mode 600
        rank_zero_info(f"token losses written to {path}")
