"""Sequences of several lengths in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def padded(
    sequences: Sequence[Sequence[int]], side: Literal["left", "right"], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Tokens `[B, T]`, padded on one side, and where they are none of the padding, `[B, T]` bool; None if there is no padding."""
    longest = max(map(len, sequences))
    tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        real = slice(longest - len(sequence), longest) if side == "left" else slice(len(sequence))
        tokens[row, real], mask[row, real] = torch.tensor(sequence), True
    return tokens.to(device), None if bool(mask.all()) else mask.to(device)
