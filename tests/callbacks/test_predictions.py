"""What `predict` writes of data whose order Lightning does not know."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset

from nlgmoe import MoEGPTModule
from nlgmoe.callbacks.predictions import PredictionFile
from tests.test_module import CONFIG, trainer


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(5):
            tokens = torch.full((CONFIG.seq_len,), index)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            yield {"tokens": tokens, "targets": tokens, "token_mask": mask, "domain": torch.tensor(0)}


class Streamed(LightningDataModule):
    def predict_dataloader(self) -> DataLoader:
        return DataLoader(Stream(), batch_size=2)


def test_rows_of_a_stream_are_written_without_their_places(tmp_path: Path) -> None:
    trainer(tmp_path, PredictionFile()).predict(MoEGPTModule(CONFIG), Streamed(), return_predictions=False)
    written = load_file(tmp_path / "predictions.safetensors")
    assert {name: value.shape for name, value in written.items()} == {"losses": (5, CONFIG.seq_len)}
