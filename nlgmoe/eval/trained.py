"""A trained model as its user has it: the weights of a checkpoint, and the tokenizer that goes with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nlgmoe.checkpoint.folder import read_document, read_tokenizer
from nlgmoe.checkpoint.layout import PRECISIONS
from nlgmoe.checkpoint.newest import find
from nlgmoe.checkpoint.portable import load_model
from nlgmoe.data.tokenizer import Tokenizer, load_tokenizer
from nlgmoe.model.gpt import GPT


@dataclass(frozen=True)
class Trained:
    """A model that can be used.

    Attributes:
        path: the checkpoint.
        model: in evaluation mode.
        tokenizer: whose ids it knows.
        document: what the checkpoint says of itself (`checkpoint.json`).
    """

    path: Path
    model: GPT
    tokenizer: Tokenizer
    document: dict[str, Any]


def load_trained(
    checkpoint: str | Path,
    tokenizer: str | None = None,
    device: str | torch.device = "cpu",
    precision: Literal["fp32", "bf16"] | None = None,
    data_dir: str | Path = "data/pocket_pile",
) -> Trained:
    """Load a checkpoint with its tokenizer.

    Args:
        checkpoint: the folder, `NAME.ckpt`; of a run's folder, the newest valid one.
        tokenizer: as `data.tokenizer`; None: the one that is in the checkpoint.
        device: where the model goes.
        precision: of its weights and products, `fp32` or `bf16`; None: as they are stored.
        data_dir: where tokenizers that are given by name are kept.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or its tokenizer is missing or has more ids than the model.
    """
    path = find(checkpoint)
    document, stored = read_document(path), read_tokenizer(path)
    if tokenizer is not None:
        found = load_tokenizer(tokenizer, Path(data_dir))
    elif stored is not None:
        found = Tokenizer.from_json(stored, f"of {path}")
    else:
        raise ValueError(f"tokenizer=null: {path} holds none; set it to the one that the model was trained with")
    model = load_model(path)
    if found.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer={found.name} has {found.vocab_size} ids, the model {model.config.vocab_size}; set it to the one that "
            "the model was trained with"
        )
    return Trained(path, model.to(device, PRECISIONS.get(precision or "")), found, document)
