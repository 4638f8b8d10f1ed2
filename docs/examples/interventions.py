"""Change the routing of a trained model: switch an expert off, route around it, or replay a recorded routing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

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
    """Drop the assignments of an expert: its tokens pass by."""

    def edit(routing: Routing) -> Routing:
        off = routing.expert == expert  # [N, k]
        weight = routing.weight.masked_fill(off, 0)
        return replace(routing, weight=weight, kept=routing.kept & ~off, all_kept=False)

    return edit


def around(expert: int) -> Callable[[Routing], Routing]:
    """Send the tokens of an expert to the next probable ones, with the weights of those."""

    def edit(routing: Routing) -> Routing:
        probs = routing.probs.clone()  # [N, E]
        probs[:, expert] = 0
        weight, chosen = probs.topk(routing.expert.shape[1], dim=1)  # [N, k]
        if weight.shape[1] > 1:
            weight = weight / weight.sum(dim=1, keepdim=True)
        return replace(routing, expert=chosen, weight=weight.masked_fill(~routing.kept, 0))

    return edit


def replay(recorded: Routing) -> Callable[[Routing], Routing]:
    """Choose the recorded experts with the recorded weights, whatever the hidden states are."""
    return lambda routing: replace(routing, expert=recorded.expert, weight=recorded.weight, kept=recorded.kept)
