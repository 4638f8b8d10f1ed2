"""Megatron's own reader and writer of its format, without the warnings about what it would need on GPUs."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

__all__ = ["IndexedDatasetBuilder", "MegatronDataset"]
