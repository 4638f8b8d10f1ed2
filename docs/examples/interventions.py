"""Change the routing of a trained model: switch an expert off, route around it, or replay a recorded routing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from nlgmoe import GPT, Routing


@contextmanager
def intervened(model: GPT, block: int, edit: Callable[[Routing], Routing]) -> Iterator[None]:
    """Apply `edit` to every routing of a block, counted from 0: a forward hook's result replaces the router's."""
    handle = model.blocks[block].moe.router.register_forward_hook(lambda router, inputs, routing: edit(routing))
    try:
        yield
    finally:
        handle.remove()


def without(expert: int) -> Callable[[Routing], Routing]:
    """Drop the assignments of an expert."""

    def edit(routing: Routing) -> Routing:
        off = routing.expert == expert  # [N, k]
        weight = routing.weight.masked_fill(off, 0)
        return replace(routing, weight=weight, kept=routing.kept & ~off)

    return edit


def around(expert: int) -> Callable[[Routing], Routing]:
    """Send the tokens of an expert to the next most probable one, with its weight; do not change other tokens.

    Raises:
        ValueError: the weights are not the paper's.
    """

    def edit(routing: Routing) -> Routing:
        if routing.probs is None or not torch.allclose(_weights(routing, routing.expert), routing.weight, atol=1e-5):
            raise ValueError("around: the router's weights are not the paper's; write an edit of your own for it")
        off = routing.expert == expert  # [N, k]
        others = routing.probs.scatter(1, routing.expert, -1)  # [N, E]
        chosen = torch.where(off, others.argmax(dim=1, keepdim=True), routing.expert)
        return replace(routing, expert=chosen, weight=_weights(routing, chosen), capacity=None)

    return edit


def _weights(routing: Routing, chosen: Tensor) -> Tensor:
    """Return the paper's weights of the experts `chosen`, `[N, k]`."""
    weight = routing.probs.gather(1, chosen).masked_fill(~routing.kept, 0)
    return weight if chosen.shape[1] == 1 else weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-7)


def replay(recorded: Routing) -> Callable[[Routing], Routing]:
    """Use the recorded experts and weights for any hidden states."""

    def edit(routing: Routing) -> Routing:
        same = {name: getattr(recorded, name) for name in ("expert", "weight", "kept", "capacity")}
        return replace(routing, **same)

    return edit
