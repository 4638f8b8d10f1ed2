"""Megatron's own reader and writer of its format, without the warnings about what it would need on GPUs."""

import warnings
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

__all__ = ["Content", "IndexedDatasetBuilder", "MegatronDataset", "content"]

Content = tuple[bytes, bytes]  # of .bin and .idx


def content(prefix: Path) -> Content:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
