"""Loading a checkpoint for use: model and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from nlgmoe.checkpoint.entries import dtype_of
from nlgmoe.checkpoint.portable import build_model
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.run_checkpoints import find_checkpoint
from nlgmoe.config import GPTConfig
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import load_tokenizer
from nlgmoe.eval.interventions import Removal, parse_experts, remove_experts
from nlgmoe.model.gpt import GPT
from nlgmoe.parallel.triton_grouped_gemm import set_triton_grouped_gemm
from nlgmoe.validation import SettingError, require


@dataclass(frozen=True)
class LoadedModel:
    """A model loaded from a checkpoint.

    Attributes:
        path: the checkpoint folder.
        model: the model, in evaluation mode.
        tokenizer: the tokenizer that the model was trained with.
        document: contents of `checkpoint.json`.
    """

    path: Path
    model: GPT
    tokenizer: Tokenizer
    document: dict[str, Any]


def load_pretrained(
    checkpoint: str | Path,
    tokenizer: str | None = None,
    device: str | torch.device = "cpu",
    precision: Literal["fp32", "bf16"] | None = None,
    data_dir: str | Path = "data/pocket_pile",
    without: Sequence[str] = (),
    removal: Removal = "route_around",
    experts_per_token: int | None = None,
) -> LoadedModel:
    """Load a checkpoint with its tokenizer.

    Args:
        checkpoint: the folder, `NAME.ckpt`, or a run folder: its newest valid checkpoint is loaded.
        tokenizer: as `data.tokenizer`, for a checkpoint without a tokenizer.
        precision: `fp32` or `bf16`, for weights and matrix products; None: the stored precision.
        data_dir: folder of tokenizers given by name.
        without: experts to remove, such as `0:3,7`: experts 3 and 7 of MoE layer 0 (`eval/interventions.py`).
        removal: `route_around`: other experts take their tokens; `contribution`: their output is 0.
        experts_per_token: in place of the model's `top_k`.

    Raises:
        ValueError: the checkpoint does not exist or is damaged, or its tokenizer is missing, differs from the given one, or has
            more ids than the model.
    """
    found = find_checkpoint(checkpoint)
    given = None if tokenizer is None else load_tokenizer(tokenizer, Path(data_dir))
    chosen = choose_tokenizer(found, given)
    if chosen is None:
        raise SettingError(
            f"tokenizer=null: {found.path} holds none; set it to the one that the model was trained with"
        )
    model = build_model(found, _with_top_k(found.config, experts_per_token)).to(device, dtype_of(precision))
    set_triton_grouped_gemm(model, torch.device(device))
    remove_experts(model, parse_experts(without, model.config, "without"), removal)
    return LoadedModel(found.path, model, chosen, found.document)


def _with_top_k(config: GPTConfig, top_k: int | None) -> GPTConfig:
    if top_k is None:
        return config
    require(config.moe is not None, f"experts_per_token={top_k}: the model has no experts: it is dense")
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, top_k=top_k))


def choose_tokenizer(checkpoint: Checkpoint, given: Tokenizer | None) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint, or `given` if the checkpoint has none."""
    stored, path, vocab_size = checkpoint.tokenizer(), checkpoint.path, checkpoint.config.vocab_size
    chosen = given if stored is None else Tokenizer.from_files(stored, f"of {path}")
    if chosen is None:
        return None
    if given is not None and not given.has_same_ids(chosen):
        raise SettingError(
            f"tokenizer={given.name} differs from the tokenizer that {path} was saved with; leave it out"
        )
    if chosen.vocab_size > vocab_size:
        raise SettingError(
            f"tokenizer={chosen.name} has {chosen.vocab_size} ids, the model {vocab_size}; set it to the tokenizer that "
            "the model was trained with"
        )
    return chosen
