"""Expert parallelism: send rows to the ranks that hold their experts, and the outputs back, by one all-to-all each.

    AllToAllDispatch(...)   starts sending rows, sorted by expert; the caller may compute something else meanwhile
    receive                 waits for the rows of all ranks, and sorts them by the experts held here
    combine                 sends the experts' outputs back to the ranks of their rows, which sum them by token

The host needs the sizes of the messages. If experts have a capacity, and ranks equally many tokens, every rank sends a fixed
number of padded slots to every expert. Otherwise the host waits for the device to count the rows, once per layer, and only rows
are sent. The backward pass of an all-to-all is the reverse all-to-all; it overlaps with the backward pass of the computation
between the constructor and `receive`.

Letters: W ranks of the expert-parallel group, E experts of the layer, e = E / W experts held here, C slots of an expert for the
rows of one rank, R rows of this rank, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from nlgmoe.layers.dispatch import LocalDispatch, LocalDispatcher, Rows
from nlgmoe.layers.placement import ExpertPlacement
from nlgmoe.layers.router import Routing

MAX_SLOTS = 1.25  # per assignment; with more, sending the padding costs more than waiting


class AllToAllDispatcher(LocalDispatcher):
    """Dispatches tokens to experts that are sharded over a group of ranks.

    Args:
        placement: placement of the layer's experts, with a group.
    """

    def __init__(self, placement: ExpertPlacement) -> None:
        super().__init__()
        self.placement = placement

    def forward(self, tokens: Tensor, routing: Routing) -> AllToAllDispatch:
        """Start sending `tokens`, `[N, H]`, to the ranks of their experts."""
        # In evaluation the ranks' last micro-batches may differ in size.
        slots = fixed_slots(routing) if self.training and self.equal_batches else None
        return AllToAllDispatch(tokens, routing, self.placement, slots)


def fixed_slots(routing: Routing) -> int | None:
    """Return C if experts have a capacity and few slots can stay empty; None: rows must be counted.

    Ranks whose micro-batches have equally many tokens get equal results.
    """
    if routing.capacity is None or routing.capacity * routing.num_experts > MAX_SLOTS * routing.expert.numel():
        return None
    return routing.capacity


class AllToAllDispatch(LocalDispatch):
    """The exchange of a micro-batch's rows with the experts on the ranks of a group.

    Args:
        tokens: `[N, H]`.
        routing: their experts and weights.
        placement: placement of the layer's experts, with a group.
        slots: C, an upper bound of an expert's rows from each rank, the same on all ranks of the group; None: rows are counted.
    """

    def __init__(self, tokens: Tensor, routing: Routing, placement: ExpertPlacement, slots: int | None = None) -> None:
        super().__init__(tokens, routing)
        rows, tokens_per_expert, _ = super().receive()  # [R, H], sorted by expert; those past the sum are not sent
        self._total = len(rows)
        self._slot_of_row: Tensor | None = None  # [R]; None: rows were sent without padding
        ranks = distributed.get_world_size(placement.group)
        sent_counts = tokens_per_expert.view(ranks, placement.count)  # [W, e] rows for each rank
        received_counts = torch.empty_like(sent_counts)  # [W, e] rows from each rank
        distributed.all_to_all_single(received_counts, sent_counts, group=placement.group)
        self._tokens_here = received_counts.sum(dim=0)  # [e]
        expert = torch.arange(placement.count, device=rows.device)
        if slots is not None:
            sent = received = [placement.count * slots] * ranks
            used = torch.arange(slots, device=rows.device) < received_counts.unsqueeze(-1)  # [W, e, C]
            expert_of_row = torch.where(used, expert.unsqueeze(-1), placement.count).flatten()
            row_of_slot, self._slot_of_row = _pad_to_slots(tokens_per_expert, slots, len(rows))
            rows = rows.index_select(0, row_of_slot)  # [E * C, H]
        else:
            sent, received = torch.stack(
                [sent_counts.sum(dim=1), received_counts.sum(dim=1)]
            ).tolist()  # the host waits
            expert_of_row = torch.repeat_interleave(
                expert.repeat(ranks), received_counts.flatten(), output_size=sum(received)
            )
            if sum(sent) < len(rows):  # a slice of all rows would be copied in the backward pass
                rows = rows[: sum(sent)]
        self._order_here = expert_of_row.argsort(stable=True)  # rows arrive sorted by rank
        self._exchange = _Exchange(placement.group, sent, received)
        self._num_sent = tokens_per_expert.sum()
        self._started = _Start.apply(rows, self._exchange)

    def receive(self) -> Rows:
        """Wait for the rows of all ranks, and sort them by the experts held here; rows past the sum are padding."""
        received = _Wait.apply(self._started, self._exchange)
        del self._started  # not needed while the experts run
        return Rows(received.index_select(0, self._order_here), self._tokens_here, self._slot_of_row is None)

    def combine(self, y: Tensor) -> Tensor:
        """Send the experts' outputs back to the ranks of their rows, and sum them by token."""
        inverse = torch.empty_like(self._order_here)
        inverse[self._order_here] = torch.arange(len(inverse), device=inverse.device)
        exchange = self._exchange.reversed()
        outputs = _Wait.apply(_Start.apply(y.index_select(0, inverse), exchange), exchange)
        return super().combine(self._to_rows(outputs))

    def _to_rows(self, outputs: Tensor) -> Tensor:
        """Return the output of each of this rank's rows, `[R, H]`; 0 for rows that were not sent."""
        if self._slot_of_row is not None:
            unsent = torch.arange(self._total, device=outputs.device) >= self._num_sent
            return outputs.index_select(0, self._slot_of_row).masked_fill(unsent.unsqueeze(-1), 0)
        count = self._total - len(outputs)
        return torch.cat([outputs, outputs.new_zeros(count, outputs.shape[1])]) if count else outputs


def _pad_to_slots(tokens_per_expert: Tensor, slots: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return the row of each slot, `[E * C]`, and the slot of each row, `[R]`.

    Empty slots get arbitrary rows, evenly spread: adding many gradients to one row would be slow.
    """
    ends = tokens_per_expert.cumsum(0)
    first = ends - tokens_per_expert  # [E]
    slot = torch.arange(slots, device=ends.device)
    row_of_slot = (first.unsqueeze(-1) + slot).clamp_max(rows - 1).flatten()
    row = torch.arange(rows, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True).clamp_max(len(ends) - 1)
    slot_of_row = (expert * slots + row - first[expert]) % len(row_of_slot)
    return row_of_slot, slot_of_row


class _Exchange:
    """An asynchronous all-to-all of rows, and its reverse in the backward pass.

    Args:
        group: W ranks.
        sent: number of rows for each rank.
        received: number of rows from each rank.
    """

    def __init__(self, group: Any, sent: list[int], received: list[int]) -> None:
        self.group, self.sent, self.received = group, sent, received
        self._work: Any = None
        self._result: Tensor | None = None

    def reversed(self) -> _Exchange:
        """Return the exchange in the other direction."""
        return _Exchange(self.group, self.received, self.sent)

    def start(self, rows: Tensor, *, backward: bool = False) -> Tensor:
        """Send `rows`; the result must not be read before `wait`."""
        sent, received = (self.received, self.sent) if backward else (self.sent, self.received)
        self._result = rows.new_empty(sum(received), rows.shape[1])
        self._work = distributed.all_to_all_single(
            self._result, rows.contiguous(), received, sent, group=self.group, async_op=True
        )
        return self._result

    def wait(self) -> Tensor:
        """Return the rows received."""
        assert self._work is not None and self._result is not None
        self._work.wait()
        result, self._work, self._result = self._result, None, None
        return result


class _Start(torch.autograd.Function):
    """Start an exchange. Backward: wait for the reverse one, which `_Wait` started."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class _Wait(torch.autograd.Function):
    """Wait for an exchange. Backward: start the reverse one with the gradient.

    The gradient returned to `_Start` only orders the two functions; `_Start` reads the values from the exchange.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.wait().view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start(grad, backward=True)
        return grad, None
