"""Warm start: a new run that takes its initial weights from a checkpoint. Clock, optimizer, data and noise start from zero.

Each rank reads the dense entries and those of its own experts, one at a time. Every rank computes the shapes of all
entries, so that all ranks find the same differences.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlgmoe.checkpoint.entries import Entry, entry_shapes, local_entries
from nlgmoe.checkpoint.reading import tokenizer_matches
from nlgmoe.checkpoint.run_checkpoints import find_checkpoint
from nlgmoe.config import GPTConfig
from nlgmoe.data.model_files import TokenizerFiles
from nlgmoe.model.gpt import GPT
from nlgmoe.parts import ForeignCodeError
from nlgmoe.ranks import raise_on_all_ranks
from nlgmoe.validation import SettingError, list_differences

_BLOCK = re.compile(r"blocks\.(?P<block>\d+)\.(?P<rest>.*)")


@dataclass(frozen=True)
class WarmStart:
    """Start a new run from the weights of a checkpoint, without its optimizer, clock and data position.

    Attributes:
        checkpoint: folder of the checkpoint, such as runs/quickstart/checkpoints/last.ckpt, or a run folder: its newest valid
            checkpoint.
        strict: refuse a checkpoint with missing or unknown tensors, tensors of other shapes, or another tokenizer than the
            data's; if false, load the tensors that fit, keep the initial values of the others, and list the differences.
        layers: for each block of the model, the checkpoint's block that it starts from, counted from 0, for example a student's
            from its teacher's (`nlgmoe student` writes them). If `strict`, a dense block starts from a
            dense one, an MoE block from one with as many experts. null: from the block of the same number.
    """

    checkpoint: str
    strict: bool = True
    layers: list[int] | None = None


@dataclass(frozen=True)
class WarmStartResult:
    """The result of a warm start."""

    model_config: dict[str, Any]  # the model configuration of the checkpoint
    report: str  # how many values were loaded, and one line for each difference
    path: Path  # the checkpoint
    family: str | None  # the family of `transformers` that the checkpoint's model was imported from; None: no one


@torch.no_grad()
def load_initial_weights(
    model: GPT,
    start: WarmStart,
    on_entry: Callable[[Entry, Tensor], None] | None = None,
    tokenizer: TokenizerFiles | None = None,
) -> WarmStartResult:
    """Load a checkpoint's weights into `model`, or this rank's shard of it. A collective.

    Calls `on_entry` with each entry and its values in the stored dtype. A tokenizer is compared with the checkpoint's.
    """
    blocks = "" if start.layers is None else f", blocks {', '.join(map(str, start.layers))} (counted from 0)"
    with raise_on_all_ranks():
        checkpoint = find_checkpoint(start.checkpoint)
        path, document = checkpoint.path, checkpoint.document
        files, shapes = checkpoint.tensors("model"), entry_shapes(model)
        stored = files.shapes
        sources = {name: name for name in stored}
        if start.layers is not None:
            sources = _rename_blocks(sources, start.layers)
        available = {name: stored[source] for name, source in sources.items()}
        fitting = {name for name, shape in shapes.items() if available.get(name) == shape}
        different = list_differences(available, shapes, limit=None if fitting and not start.strict else 5)
        if tokenizer is not None and not tokenizer_matches(tokenizer, checkpoint.tokenizer()):
            different.insert(0, "token_embedding.weight (of another tokenizer than data.tokenizer)")
        if not fitting:
            raise SettingError(
                f"no tensor of {start.checkpoint}{blocks} fits the model: {', '.join(different)}; use another checkpoint"
            )
        if different and start.strict:
            raise SettingError(
                f"the weights of {path}{blocks} do not fit the model: {', '.join(different)}; use another checkpoint or "
                "other model.warm_start.layers, or model.warm_start.strict=false to load what fits"
            )
        for entry in local_entries(model):
            if entry.name in fitting:
                value = files.read(sources[entry.name])
                entry.copy_(value)
                if on_entry is not None:
                    on_entry(entry, value)
    total, loaded = (sum(shapes[name].numel() for name in names) for names in (shapes, fitting))
    more = "; differences:" if different else ""
    head = f"the weights are those of {path}{blocks}: loaded {loaded:,} of {total:,} values{more}"
    saved = document["model_config"]
    with suppress(ForeignCodeError):  # settings that it lacks get their defaults
        saved = GPTConfig.from_dict(saved).to_dict()
    return WarmStartResult(saved, "\n  ".join([head, *different]), path, document.get("family"))


def _rename_blocks(names: dict[str, str], layers: list[int]) -> dict[str, str]:
    sources = {}
    for name in names:
        if match := _BLOCK.fullmatch(name):
            for block, source in enumerate(layers):
                if source == int(match["block"]):
                    sources[f"blocks.{block}.{match['rest']}"] = name
        else:
            sources[name] = name
    return sources
