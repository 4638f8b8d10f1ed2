"""A checkpoint of weights that come from elsewhere: a model to use, or to start a run from with `model.warm_start`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning
import torch
from torch import Tensor

from nlgmoe.checkpoint import writing
from nlgmoe.checkpoint.folder import Contents
from nlgmoe.checkpoint.layout import entry_shapes
from nlgmoe.checkpoint.portable import make_document
from nlgmoe.config import GPTConfig
from nlgmoe.model.gpt import GPT

SHARD_VALUES = 2**28  # of a file, unless one entry has more; what is held in memory at once


def write_weights(
    path: str | Path,
    read: Callable[[str], Tensor],
    config: GPTConfig,
    tokenizer: str | None = None,
    global_step: int = 0,
    tokens_seen: int = 0,
) -> None:
    """Write the folder `path`, whole or not at all, file by file.

    Args:
        path: the checkpoint, `NAME.ckpt`; what is there is replaced.
        read: gives an entry by its name, such as `blocks.1.moe.experts.3.expand_weight`; asked once for each, those of an
            expert one after the other.
        config: of the model.
        tokenizer: whose ids it knows, as JSON of the `tokenizers` library; None: none goes with it.
        global_step: optimizer steps behind the weights.
        tokens_seen: tokens behind the weights.

    Raises:
        ValueError: it cannot be written, or `read` raised.
    """
    path, shards = Path(path), _shards(weight_shapes(config))
    document, _ = make_document(
        {
            # What Lightning and `MoEGPTModule` read of a checkpoint that is evaluated.
            "epoch": 0,
            "global_step": global_step,
            "pytorch-lightning_version": lightning.__version__,
            "model_config": config.to_dict(),
            "tokens_seen": tokens_seen,
            "step_samples": None,
            "non_finite": {"skipped": 0, "in_a_row": 0},
            "seed": 0,
        },
        path.parent,
    )
    with writing.explained(path):
        temporary = writing.begin(path)
        try:
            files: dict[str, Contents] = {}
            for number, names in enumerate(shards):
                entries = {name: read(name) for name in names}
                files |= writing.write_tensors(temporary, "model", entries, number, len(shards))
            writing.finish(temporary, path, document, files, tokenizer)
        finally:
            writing.abandon(temporary)


def weight_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Shape of every entry of a model."""
    with torch.device("meta"):
        return entry_shapes(GPT(config))


def _shards(shapes: dict[str, torch.Size]) -> list[list[str]]:
    """Entries by file, in order."""
    shards: list[list[str]] = [[]]
    values = 0
    for name, shape in shapes.items():
        if shards[-1] and values + shape.numel() > SHARD_VALUES:
            shards.append([])
            values = 0
        shards[-1].append(name)
        values += shape.numel()
    return shards
