"""Rows travel to the ranks that hold their experts, and back, by one all-to-all each way.

    depart   rows sorted by expert start for the ranks of their experts; this rank may compute something else meanwhile
    arrive   rows from every rank are here, sorted by the experts held here
    back     the experts' outputs return to where their rows came from

The host has to know the sizes of the messages. Where experts have a capacity they are known beforehand: every expert gets as
many slots from every rank, and slots without a row carry one that nobody reads. Otherwise the host waits for the device to say
how many rows there are, once a layer, and exactly those are sent. Backward, each all-to-all is the other way round, and
overlaps with whatever ran between `depart` and `arrive`.

Letters: W ranks of the expert-parallel group, E experts of the layer, e = E / W experts held here, C slots of an expert for the
rows of one rank, R rows of this rank, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from nlgmoe.layers.placement import ExpertPlacement
from nlgmoe.layers.router import Routing

MOST_SLOTS = 1.25  # per assignment; with more, sending what nobody reads costs more than waiting


def fixed_slots(routing: Routing) -> int | None:
    """C where experts have a capacity and few slots can stay empty; None: rows have to be counted.

    It is the same on all ranks if their micro-batches have equally many tokens.
    """
    if routing.capacity is None or routing.capacity * routing.num_experts > MOST_SLOTS * routing.expert.numel():
        return None
    return routing.capacity


class Journey:
    """One trip of one micro-batch's rows through the experts of one layer.

    Args:
        rows: `[R, H]` sorted by expert; rows past the sum of `tokens_per_expert` belong to none and stay at home.
        tokens_per_expert: `[E]` int64.
        placement: of the layer's experts.
        slots: C, which no expert's rows exceed on any rank of the group, the same on all of them; None: rows are counted.
    """

    def __init__(
        self, rows: Tensor, tokens_per_expert: Tensor, placement: ExpertPlacement, slots: int | None = None
    ) -> None:
        self._placement = placement
        self._total = len(rows)
        self._home: Tensor | None = None  # [R] the slot of each row that left; None: they left as they stood
        if placement.group is None:
            self._rows, self._rows_here = rows, tokens_per_expert
            return
        ranks = distributed.get_world_size(placement.group)
        asked = tokens_per_expert.view(ranks, placement.count)  # [W, e] rows that go to each rank
        given = torch.empty_like(asked)  # [W, e] rows that come from each rank
        distributed.all_to_all_single(given, asked, group=placement.group)
        self._rows_here = given.sum(dim=0)  # [e]
        expert = torch.arange(placement.count, device=rows.device)
        if slots is not None:
            sent = received = [placement.count * slots] * ranks
            used = torch.arange(slots, device=rows.device) < given.unsqueeze(-1)  # [W, e, C]
            by_source = torch.where(used, expert.unsqueeze(-1), placement.count).flatten()
            leaving, self._home = _in_slots(tokens_per_expert, slots, len(rows))
            rows = rows.index_select(0, leaving)  # [E * C, H]
        else:
            sent, received = torch.stack([asked.sum(dim=1), given.sum(dim=1)]).tolist()  # the host waits here
            by_source = torch.repeat_interleave(expert.repeat(ranks), given.flatten(), output_size=sum(received))
            rows = _first(rows, sum(sent))
        self._order = by_source.argsort(stable=True)  # rows come sorted by source; the experts want them by expert
        self._exchange = _Exchange(placement.group, sent, received)
        self._belong = tokens_per_expert.sum()
        self._rows = _Depart.apply(rows, self._exchange)

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Rows for the experts held here, sorted by expert, and how many each of them gets, `[e]`; rows past their sum are slots
        without a row."""
        if self._placement.group is None:
            return self._rows, self._rows_here
        arrived = _Arrive.apply(self._rows, self._exchange)
        del self._rows  # not needed while the experts run
        return arrived.index_select(0, self._order), self._rows_here

    def back(self, y: Tensor) -> Tensor:
        """The experts' outputs, in the order of `arrive` -> in the order of the rows that left, `[R, H]`; 0 for rows of none."""
        if self._placement.group is None:
            return y
        place = torch.empty_like(self._order)
        place[self._order] = torch.arange(len(place), device=place.device)
        exchange = self._exchange.reversed()
        home = _Arrive.apply(_Depart.apply(y.index_select(0, place), exchange), exchange)
        if self._home is not None:
            stayed = torch.arange(self._total, device=y.device) >= self._belong
            return home.index_select(0, self._home).masked_fill(stayed.unsqueeze(-1), 0)
        count = self._total - len(home)
        return torch.cat([home, home.new_zeros(count, home.shape[1])]) if count else home


def _in_slots(tokens_per_expert: Tensor, slots: int, rows: int) -> tuple[Tensor, Tensor]:
    """The row of each slot, `[E * C]`, and the slot of each row, `[R]`; any where there is none, spread for the backward pass."""
    ends = tokens_per_expert.cumsum(0)
    first = ends - tokens_per_expert  # [E]
    place = torch.arange(slots, device=ends.device)
    row_of_slot = (first.unsqueeze(-1) + place).clamp_max(rows - 1).flatten()
    row = torch.arange(rows, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True).clamp_max(len(ends) - 1)
    slot_of_row = (expert * slots + row - first[expert]) % len(row_of_slot)
    return row_of_slot, slot_of_row


def _first(rows: Tensor, count: int) -> Tensor:
    """`rows[:count]`, without the copy that its gradient would take where that is all of them."""
    return rows if count == len(rows) else rows[:count]


class _Exchange:
    """An all-to-all of rows, under way in one direction or, backward, in the other.

    Args:
        group: W ranks.
        sent: rows for each rank.
        received: rows from each rank.
    """

    def __init__(self, group: Any, sent: list[int], received: list[int]) -> None:
        self.group, self.sent, self.received = group, sent, received
        self._work: Any = None
        self._result: Tensor | None = None

    def reversed(self) -> _Exchange:
        """The way home."""
        return _Exchange(self.group, self.received, self.sent)

    def start(self, rows: Tensor, *, backward: bool = False) -> Tensor:
        """Send `rows`; the result is not to be read before `wait`."""
        sent, received = (self.received, self.sent) if backward else (self.sent, self.received)
        self._result = rows.new_empty(sum(received), rows.shape[1])
        self._work = distributed.all_to_all_single(
            self._result, rows.contiguous(), received, sent, group=self.group, async_op=True
        )
        return self._result

    def wait(self) -> Tensor:
        """The rows that came."""
        assert self._work is not None and self._result is not None
        self._work.wait()
        result, self._work, self._result = self._result, None, None
        return result


class _Depart(torch.autograd.Function):
    """Start an exchange. Backward: end the reverse one, which `_Arrive` has started."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class _Arrive(torch.autograd.Function):
    """End an exchange. Backward: start the reverse one with the gradient, which travels while other nodes run.

    What this hands to `_Depart` is only the signal to go on: the gradient itself has another number of rows.
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
