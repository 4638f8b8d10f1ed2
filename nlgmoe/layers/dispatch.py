"""Tokens -> expert order -> back. Pure bookkeeping: no parameters, no decisions (the router made them).

Letters: N tokens, k experts per token, H hidden size. An assignment is one (token, choice) pair; there are N * k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nlgmoe.layers.router import Routing


@dataclass(frozen=True)
class Dispatch:
    """The order in which assignments visit the experts.

    Attributes:
        order: `[N * k]` assignment indices sorted by expert, each expert's in token order; dropped ones last.
        rows_per_expert: `[E]` how many of them each expert computes.
    """

    order: Tensor
    rows_per_expert: Tensor

    @staticmethod
    def of(routing: Routing, num_experts: int) -> Dispatch:
        """Sort the assignments of `routing` by expert."""
        expert = torch.where(
            routing.kept, routing.expert, num_experts
        ).flatten()  # [N * k], dropped -> one past the last
        order = torch.sort(expert, stable=True).indices
        rows = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
        return Dispatch(order, rows)

    def gather(self, x: Tensor, top_k: int) -> Tensor:
        """Rows for the experts, `[N, H] -> [N * k, H]`, in `order`."""
        return x.index_select(0, self.order // top_k)

    def combine(self, y: Tensor, weight: Tensor) -> Tensor:
        """Weighted sum of each token's expert outputs, in at least fp32.

        Args:
            y: `[N * k, H]` expert outputs in `order`.
            weight: `[N, k]` gate weights, 0 where dropped.

        Returns:
            `[N, H]` in the dtype of `weight`.
        """
        num_tokens, top_k = weight.shape
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(self.order), device=place.device)  # where each assignment went
        by_token = y.index_select(0, place).view(num_tokens, top_k, -1)  # [N, k, H]
        return (by_token.to(weight.dtype) * weight.unsqueeze(-1)).sum(dim=1)
