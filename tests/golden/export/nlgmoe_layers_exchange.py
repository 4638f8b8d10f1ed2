# nlgmoe/layers/exchange.py of nlgmoe 0.1.0, copied by `nlgmoe export`; only its imports are others.
# SPDX-License-Identifier: Apache-2.0
"""Tokens travel to the ranks that hold their experts, and back. One uneven all-to-all serves dropping and dropless routing.

    depart   rows sorted by expert start for the ranks of their experts; this rank may compute something else meanwhile
    arrive   rows from every rank are here, sorted by the experts held here
    back     the experts' outputs return to where their rows came from

Rows, not padded slots, are sent: what is dropped does not travel, and nothing else does either. Backward, each exchange
is the other way round, and overlaps with whatever ran between `depart` and `arrive`.

Letters: W ranks of the expert-parallel group, E experts of the layer, e = E / W experts held here, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from .nlgmoe_layers_placement import ExpertPlacement


class Journey:
    """One trip of one micro-batch's rows through the experts of one layer.

    Args:
        rows: `[R, H]` sorted by expert; rows past the sum of `rows_per_expert` belong to none and stay at home.
        rows_per_expert: `[E]` int64.
        placement: of the layer's experts.
    """

    def __init__(self, rows: Tensor, rows_per_expert: Tensor, placement: ExpertPlacement) -> None:
        self._placement = placement
        self._total = len(rows)
        if placement.group is None:
            self._rows, self._rows_here = rows, rows_per_expert
            return
        ranks = distributed.get_world_size(placement.group)
        asked = rows_per_expert.view(ranks, placement.count)  # [W, e] rows that go to each rank
        given = torch.empty_like(asked)  # [W, e] rows that come from each rank
        distributed.all_to_all_single(given, asked, group=placement.group)
        self._rows_here = given.sum(dim=0)  # [e]
        # The one copy to the host: sizes of the messages.
        sent, received = torch.stack([asked.sum(dim=1), given.sum(dim=1)]).tolist()
        self._exchange = _Exchange(placement.group, sent, received)
        expert = torch.arange(placement.count, device=rows.device).repeat(ranks)
        by_source = torch.repeat_interleave(expert, given.flatten(), output_size=sum(received))
        self._order = by_source.argsort(stable=True)  # rows come sorted by source; the experts want them by expert
        self._rows = _Depart.apply(_first(rows, sum(sent)), self._exchange)

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Rows for the experts held here, sorted by expert, and how many each of them gets, `[e]`."""
        if self._placement.group is None:
            return self._rows, self._rows_here
        arrived = _Arrive.apply(self._rows, self._exchange)
        del self._rows  # not needed while the experts run
        return arrived.index_select(0, self._order), self._rows_here

    def back(self, y: Tensor) -> Tensor:
        """The experts' outputs, in the order of `arrive` -> in the order of the rows that left, `[R, H]`."""
        if self._placement.group is None:
            return y
        place = torch.empty_like(self._order)
        place[self._order] = torch.arange(len(place), device=place.device)
        exchange = self._exchange.reversed()
        home = _Arrive.apply(_Depart.apply(y.index_select(0, place), exchange), exchange)
        stayed = self._total - len(home)
        return torch.cat([home, home.new_zeros(stayed, home.shape[1])]) if stayed else home


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
