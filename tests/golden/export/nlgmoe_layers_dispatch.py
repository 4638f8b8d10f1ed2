# nlgmoe/layers/dispatch.py of nlgmoe 0.1.0, copied by `nlgmoe export`; only its imports are others.
# SPDX-License-Identifier: Apache-2.0
"""Tokens -> expert order -> back. Pure bookkeeping: no parameters, no decisions (the router made them).

Letters: N tokens, k experts per token, H hidden size. An assignment is one (token, choice) pair; there are N * k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .nlgmoe_layers_router import Routing, count


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
        rows = count(expert, num_experts + 1)[:num_experts]
        return Dispatch(order, rows)

    def source(self, top_k: int) -> Tensor:
        """`[N * k]` the token of each row, in `order`."""
        return self.order // top_k

    def scale(self, weight: Tensor) -> Tensor:
        """`[N * k]` the gate weight of each row, from `[N, k]`; 0 where dropped."""
        return weight.flatten().index_select(0, self.order)

    def combine(self, y: Tensor, top_k: int) -> Tensor:
        """Sum of each token's weighted expert outputs.

        Args:
            y: `[N * k, H]` expert outputs in `order`, times their gate weights, in at least fp32.
            top_k: k.

        Returns:
            `[N, H]`.
        """
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(self.order), device=place.device)  # where each assignment went
        by_token = y.index_select(0, place)
        return by_token if top_k == 1 else by_token.view(-1, top_k, y.shape[-1]).sum(dim=1)
