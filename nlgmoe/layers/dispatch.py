"""DISPATCH and COMBINE: sort tokens by their experts, and sum the experts' outputs by token. No parameters.

    dispatch = dispatcher(tokens, routing)         chosen in `MoELayer.__init__`: `LocalDispatcher`, or `AllToAllDispatcher`
    rows     = dispatch.receive()                  [M, H], sorted by expert; under expert parallelism of all ranks
    y        = dispatch.combine(experts(rows))     [N, H]; sum over a token's choices of weight * output

Under expert parallelism each rank holds an equal slice of the experts: `AllToAllDispatcher` sends every row to the rank of its
expert, and the output back, by one all-to-all each (`all_to_all.py`).

Letters: N tokens, k experts per token, H hidden size, E experts, C capacity. An assignment is one (token, choice) pair; there are
N * k. M rows, sorted by expert: on CPUs of the kept assignments, in half precision a round number for each expert
(`round_up_rows`); on accelerators C slots for each expert if it has a capacity. Without a capacity, the rows of the dropped
assignments come last: the last expert processes them, and `combine` gives their outputs the weight 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nlgmoe.layers.grouped_gemm import fixed_slots, has_slots, round_up_rows
from nlgmoe.layers.precision import computing_dtype
from nlgmoe.layers.routing import Routing, count


class Rows(NamedTuple):
    """The input of the e experts held here."""

    # `[M, H]`: the first `tokens_per_expert[0]` rows are for the first expert held here, and so on; or `[e, S, H]`, S
    # slots for each.
    x: Tensor
    tokens_per_expert: Tensor | None  # `[e]` int64, sum M, unused rows included; None: `x` is in slots


class LocalDispatch:
    """The dispatch of a micro-batch `tokens`, `[N, H]`, to experts on this rank, and the combination of their outputs.

    `capacity`: C slots for each expert, an upper bound of its rows; None: its rows are counted.
    """

    def __init__(self, tokens: Tensor, routing: Routing, capacity: int | None = None) -> None:
        self.weight, self._top_k = routing.weight, routing.expert.shape[1]  # [N, k], k
        num_experts = routing.num_experts
        # [N * k], dropped -> one past the last
        expert = torch.where(routing.kept, routing.expert, num_experts).flatten()
        # Assignments sorted by expert, each expert's in token order. On accelerators all N * k, and dropped ones come last:
        # leaving them out would make the host wait for their number.
        self.order = torch.sort(expert, stable=True).indices
        self.tokens_per_expert = count(expert, num_experts + 1)[:num_experts]  # [E], kept ones
        if not has_slots(expert.device):
            self.order = self.order[: max(int(self.tokens_per_expert.sum()), 1)]  # `combine` needs a row to read
        self._tokens, self._capacity = tokens, capacity
        self._token_of_row = self.order // self._top_k
        if capacity is not None:
            row_of_slot, self._row = assign_slots(self.tokens_per_expert, capacity, len(self.order))
            self._token_of_row = self._token_of_row[row_of_slot]  # [E * C]

    def receive(self) -> Rows:
        """Return the rows for the experts held here. May be called once."""
        if self._capacity is not None:
            rows = self._tokens.index_select(0, self._token_of_row)
            return Rows(rows.unflatten(0, (-1, self._capacity)), None)
        rows_per_expert = self.tokens_per_expert.clone()
        rows_per_expert[-1] += len(self.order) - rows_per_expert.sum()
        dtype = computing_dtype(self._tokens)
        token_of_row, self._row, rows_per_expert = round_up_rows(self._token_of_row, rows_per_expert, dtype)
        return Rows(self._tokens.index_select(0, token_of_row), rows_per_expert)

    def combine(self, y: Tensor) -> Tensor:
        """Sum each token's weighted expert outputs, `y` `[M, H]` or `[e, S, H]` in the order of `receive`.

        Returns `[N, H]` in the dtype of the weights; 0 for a token that no expert kept.
        """
        by_choice = y.flatten(0, -2).index_select(0, self.row_of_assignment())  # [N * k, H]
        if self._top_k == 1:
            return by_choice * self.weight
        return (by_choice.unflatten(0, self.weight.shape) * self.weight.unsqueeze(-1)).sum(dim=1)

    def row_of_assignment(self) -> Tensor:
        """Return the row of each assignment, `[N * k]`, after `receive`; any row where dropped, with weight 0."""
        return self.order.new_zeros(self.weight.numel()).index_copy_(0, self.order, self._row)


def assign_slots(tokens_per_expert: Tensor, capacity: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return the row of each slot, `[E * C]`, and the slot of each of R rows, `[R]`, any slot for dropped ones, which come last.

    Empty slots get arbitrary rows, evenly spread: adding many gradients to one row would be slow.
    """
    ends = tokens_per_expert.cumsum(0)
    first = ends - tokens_per_expert  # [E]
    slot = torch.arange(capacity, device=ends.device)
    row_of_slot = (first.unsqueeze(-1) + slot).clamp_max(rows - 1).flatten()
    row = torch.arange(rows, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True).clamp_max(len(ends) - 1)
    slot_of_row = (expert * capacity + row - first[expert]) % len(row_of_slot)
    return row_of_slot, slot_of_row


class LocalDispatcher(nn.Module):
    """Dispatches the tokens of a micro-batch to the experts of one layer, which are all held here."""

    equal_batches = False  # all ranks train on micro-batches of equally many tokens

    def forward(self, tokens: Tensor, routing: Routing) -> LocalDispatch:
        """Start the dispatch of `tokens`, `[N, H]`; the caller may compute something else before `receive`."""
        capacity = routing.capacity if has_slots(tokens.device) else None
        return LocalDispatch(tokens, routing, fixed_slots(capacity, routing.num_experts, routing.expert.numel()))
