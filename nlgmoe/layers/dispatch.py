"""Dispatch and combine: sort assignments by expert, and sum the experts' outputs by token. No parameters.

Letters: N tokens, k experts per token, H hidden size, E experts. An assignment is one (token, choice) pair; there are N * k.
M rows are the assignments that experts compute, sorted by expert; on accelerators, the others follow them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nlgmoe.layers.counts import count
from nlgmoe.layers.router import Routing


@dataclass(frozen=True)
class Dispatch:
    """Assignments sorted by expert.

    Attributes:
        order: `[M]` assignment indices sorted by expert, each expert's in token order. On accelerators M is N * k and dropped
            ones come last: to leave them out, the host would have to wait for their number.
        tokens_per_expert: `[E]` number of rows of each expert.
        all_used: no row is a dropped assignment.
        top_k: k.
    """

    order: Tensor
    tokens_per_expert: Tensor
    all_used: bool
    top_k: int

    @staticmethod
    def from_routing(routing: Routing, num_experts: int) -> Dispatch:
        """Sort the assignments of `routing` by expert."""
        expert = torch.where(
            routing.kept, routing.expert, num_experts
        ).flatten()  # [N * k], dropped -> one past the last
        order = torch.sort(expert, stable=True).indices
        rows = count(expert, num_experts + 1)[:num_experts]
        all_used = routing.all_kept
        if expert.device.type == "cpu" and not all_used:
            used = int(rows.sum())
            order, all_used = order[: max(used, 1)], used > 0  # `combine` needs a row to read
        return Dispatch(order, rows, all_used, routing.expert.shape[1])

    def gather(self, tokens: Tensor) -> Tensor:
        """Return the token of each row, `[N, H] -> [M, H]`."""
        return tokens.index_select(0, self.order // self.top_k)

    def combine(self, y: Tensor, weight: Tensor) -> Tensor:
        """Sum each token's weighted expert outputs.

        Args:
            y: `[M, H]` expert outputs.
            weight: `[N, k]` gate weights in at least fp32; 0 where dropped.

        Returns:
            `[N, H]` in the dtype of `weight`.
        """
        rows = torch.arange(len(self.order), device=self.order.device)
        place = self.order.new_zeros(weight.numel()).index_copy_(0, self.order, rows)  # dropped: any row, with weight 0
        by_choice = y.index_select(0, place)  # [N * k, H]
        if self.top_k == 1:
            return by_choice * weight
        return (by_choice.unflatten(0, weight.shape) * weight.unsqueeze(-1)).sum(dim=1)
