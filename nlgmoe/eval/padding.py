"""Batches of sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad_sequences(
    sequences: Sequence[Sequence[int]], side: Literal["left", "right"], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return tokens `[B, T]` padded with 0 on one side, and a bool mask `[B, T]`, False at padding; None without padding."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    tokens = pad_sequence(rows, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True, padding_side=side)
    return tokens.to(device), None if bool(mask.all()) else mask.to(device)
