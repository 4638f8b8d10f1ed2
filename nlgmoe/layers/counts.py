"""Counts of small integers on the device, without waiting for the host."""

from __future__ import annotations

import torch
from torch import Tensor


def requests_per_expert(expert: Tensor, token_mask: Tensor | None, num_experts: int) -> Tensor:
    """Count each expert among the choices `expert` `[N, k]` of tokens that are not padding, `[E]` int64."""
    if token_mask is None:
        return count(expert, num_experts)
    return count(torch.where(token_mask.unsqueeze(-1), expert, num_experts), num_experts + 1)[:num_experts]


def count(values: Tensor, kinds: int) -> Tensor:
    """Count each of 0, ..., `kinds` - 1 in `values`, int64, without the synchronisation of `bincount`."""
    return values.new_zeros(kinds).scatter_add_(0, values.flatten(), values.new_ones(()).expand(values.numel()))
