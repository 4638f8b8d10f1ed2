"""Expert parallelism: send rows to the ranks that hold their experts, and the outputs back, by one all-to-all each.

    AllToAllDispatch(...)   starts sending rows, sorted by expert; the caller may compute something else meanwhile
    receive                 waits for the rows of all ranks, and sorts them by the experts held here
    combine                 sends the experts' outputs back to the ranks of their rows, which sum them by token

The host needs the sizes of the messages. If experts have a capacity, and ranks equally many tokens, every rank sends a message
of fixed size, with C slots for every expert. Otherwise the host waits for the device to count the rows, once per layer, and
only rows are sent. The backward pass of an all-to-all is the reverse all-to-all.

Letters: W ranks of the expert-parallel group, E experts of the layer, e = E / W experts held here, C capacity of an expert
for one rank, R rows of this rank, H hidden size. A slot is a place for a row in a message; without a row, it is padding.
The rows that are sent are not rounded up, those of `receive` are.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.distributed._functional_collectives import all_to_all_single_autograd

from nlgmoe.layers.dispatch import LocalDispatch, LocalDispatcher, Rows, round_up_rows
from nlgmoe.layers.feed_forward import computing_dtype
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
        capacity = fixed_capacity(routing) if self.training and self.equal_batches else None
        return AllToAllDispatch(tokens, routing, self.placement, capacity)


def fixed_capacity(routing: Routing) -> int | None:
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
        capacity: C, an upper bound of an expert's rows from each rank, the same on all ranks; None: rows are counted.
    """

    def __init__(
        self, tokens: Tensor, routing: Routing, placement: ExpertPlacement, capacity: int | None = None
    ) -> None:
        super().__init__(tokens, routing)
        self._row = torch.arange(len(self.order), device=tokens.device)
        tokens_per_expert = self._tokens_per_expert  # [E]; rows past their sum are not sent
        self._slot_of_row: Tensor | None = None  # [R]; None: rows were sent without padding
        ranks = distributed.get_world_size(placement.group)
        sent_counts = tokens_per_expert.view(ranks, placement.count)  # [W, e] rows for each rank
        received_counts = torch.empty_like(sent_counts)  # [W, e] rows from each rank
        distributed.all_to_all_single(received_counts, sent_counts, group=placement.group)
        self._tokens_here = received_counts.sum(dim=0)  # [e]
        expert = torch.arange(placement.count, device=tokens.device)
        if capacity is not None:
            sent = received = [placement.count * capacity] * ranks
            used = torch.arange(capacity, device=tokens.device) < received_counts.unsqueeze(-1)  # [W, e, C]
            expert_of_row = torch.where(used, expert.unsqueeze(-1), placement.count).flatten()
            row_of_slot, self._slot_of_row = _pad_to_slots(tokens_per_expert, capacity, len(self.order))
            token_of_row = self._token_of_row[row_of_slot]  # [E * C]
        else:
            sent, received = torch.stack(
                [sent_counts.sum(dim=1), received_counts.sum(dim=1)]
            ).tolist()  # the host waits
            expert_of_row = torch.repeat_interleave(
                expert.repeat(ranks), received_counts.flatten(), output_size=sum(received)
            )
            token_of_row = self._token_of_row[: sum(sent)]
        self._order_here = expert_of_row.argsort(stable=True)  # rows arrive sorted by rank
        self._group, self._sent, self._received = placement.group, sent, received
        rows = tokens.index_select(0, token_of_row)
        self._rows_here = all_to_all_single_autograd(rows, received, sent, placement.group)  # its first use waits

    def receive(self) -> Rows:
        """Wait for the rows of all ranks, and sort them by the experts held here; rows past the sum are padding."""
        order, self._row_here, rows_per_expert = round_up_rows(
            self._order_here, self._tokens_here, computing_dtype(self._tokens)
        )
        rows = self._rows_here.index_select(0, order)
        del self._rows_here  # not needed while the experts run
        return Rows(rows, rows_per_expert, self._slot_of_row is None)

    def combine(self, y: Tensor) -> Tensor:
        """Send the experts' outputs back to the ranks of their rows, and sum them by token."""
        inverse = torch.empty_like(self._order_here)
        inverse[self._order_here] = self._row_here
        outputs = all_to_all_single_autograd(y.index_select(0, inverse), self._sent, self._received, self._group)
        place = self.row_of_assignment()
        if self._slot_of_row is not None:
            place = self._slot_of_row[place]
        elif unsent := len(self.order) - len(outputs):
            outputs = torch.cat([outputs, outputs.new_zeros(unsent, outputs.shape[1])])
        return self._sum(outputs.index_select(0, place))


def _pad_to_slots(tokens_per_expert: Tensor, capacity: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return the row of each slot, `[E * C]`, and the slot of each row, `[R]`.

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
