"""Expert parallelism: send rows to the ranks that hold their experts, and the outputs back, by one all-to-all each.

    AllToAllDispatch(...)   starts sending rows, sorted by expert; the caller may compute something else meanwhile
    receive                 waits for the rows of all ranks, and sorts them by the experts held here
    combine                 sends the experts' outputs back to the ranks of their rows, which sum them by token

The host needs the sizes of the messages. If experts have a capacity of at most `MAX_SLOTS` per assignment in training, and
ranks equally many tokens, every rank sends a message of fixed size, with C slots for every expert. Otherwise the host waits for
the device to count the rows, once per layer, and only rows are sent. The backward pass of an all-to-all is the reverse
all-to-all.

Letters: W ranks of the expert-parallel group, E experts of the layer, e = E / W experts held here, C capacity of an expert
for one rank, R rows of this rank, H hidden size. A slot is a place for a row in a message; without a row, it is padding.
The rows that are sent are not rounded up, those of `receive` are.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn import functional as F

from nlgmoe.layers.dispatch import LocalDispatch, LocalDispatcher, Rows
from nlgmoe.layers.grouped_gemm import fixed_slots, round_up_rows
from nlgmoe.layers.precision import computing_dtype
from nlgmoe.layers.routing import Routing
from nlgmoe.pyramid import ExpertPlacement


class AllToAllDispatcher(LocalDispatcher):
    """Dispatches tokens to experts that are sharded over a group of ranks."""

    def __init__(self, placement: ExpertPlacement) -> None:
        super().__init__()
        self.placement = placement

    def forward(self, tokens: Tensor, routing: Routing) -> AllToAllDispatch:
        """Start sending `tokens`, `[N, H]`, to the ranks of their experts."""
        # In evaluation the ranks' last micro-batches may differ in size.
        capacity = routing.capacity if self.training and self.equal_batches else None
        slots = fixed_slots(capacity, routing.num_experts, routing.expert.numel())
        return AllToAllDispatch(tokens, routing, self.placement, slots)


class AllToAllDispatch(LocalDispatch):
    """The exchange of a micro-batch's rows with the experts on the ranks of a group.

    `capacity`: C, an upper bound of an expert's rows from each rank, the same on all ranks; None: rows are counted.
    """

    def __init__(
        self, tokens: Tensor, routing: Routing, placement: ExpertPlacement, capacity: int | None = None
    ) -> None:
        super().__init__(tokens, routing, capacity)
        self._placement, self._ranks = placement, distributed.get_world_size(placement.group)
        if capacity is not None:
            sent = received = [placement.count * capacity] * self._ranks
        else:
            self._row = torch.arange(len(self.order), device=tokens.device)
            # [W, e] rows for each rank and from each rank
            sent_counts = self.tokens_per_expert.view(self._ranks, placement.count)
            received_counts = torch.empty_like(sent_counts)
            distributed.all_to_all_single(received_counts, sent_counts, group=placement.group)
            counts = torch.stack([sent_counts.sum(dim=1), received_counts.sum(dim=1)])
            sent, received = counts.tolist()  # the host waits
            expert = torch.arange(placement.count, device=tokens.device).repeat(self._ranks)  # [W * e]
            expert = torch.repeat_interleave(expert, received_counts.flatten(), output_size=sum(received))
            self._order_here = expert.argsort(stable=True)  # rows arrive sorted by rank
            self._tokens_here = received_counts.sum(dim=0)  # [e]
        self._sent, self._received = sent, received
        rows = tokens.index_select(0, self._token_of_row[: sum(sent)])  # without dropped ones
        self._rows_here = all_to_all_single_autograd(rows, received, sent, placement.group)  # its first use waits

    def receive(self) -> Rows:
        """Wait for the rows of all ranks, and sort them by the experts held here."""
        if self._capacity is not None:
            rows = self._swap(self._rows_here, self._ranks, self._placement.count)
            del self._rows_here  # not needed while the experts run
            return Rows(rows.unflatten(0, (self._placement.count, -1)), None)
        dtype = computing_dtype(self._tokens)
        order, self._row_here, rows_per_expert = round_up_rows(self._order_here, self._tokens_here, dtype)
        rows = self._rows_here.index_select(0, order)
        del self._rows_here
        return Rows(rows, rows_per_expert)

    def combine(self, y: Tensor) -> Tensor:
        """Send the experts' outputs back to the ranks of their rows, and sum them by token."""
        if self._capacity is not None:
            y = self._swap(y.flatten(0, 1), self._placement.count, self._ranks)
        else:
            inverse = torch.empty_like(self._order_here)
            inverse[self._order_here] = self._row_here
            y = y.index_select(0, inverse)
        outputs = all_to_all_single_autograd(y, self._sent, self._received, self._placement.group)
        if self._capacity is None and (dropped := len(self.order) - len(outputs)):
            outputs = F.pad(outputs, (0, 0, 0, dropped))
        return super().combine(outputs)

    def _swap(self, rows: Tensor, outer: int, inner: int) -> Tensor:
        """Turn rows by `[outer, inner, C]` into rows by `[inner, outer, C]`; all are `[outer * inner * C, H]`."""
        return rows.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)
