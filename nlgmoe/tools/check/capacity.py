"""Capacity of the experts: how many assignments they keep, and which; padding takes none of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn

from nlgmoe.layers.router import Routing
from nlgmoe.tools.check.layer import (
    Batch,
    Failed,
    Layer,
    NotApplicable,
    batch_of_logits,
    collapsed,
    require_choice,
    require_close,
    scores_for,
)  # fmt: skip

TOKENS = 44  # an expert's fair share of them is not an integer
MANY = 4096  # tokens, of which bf16 cannot count an expert's


def crowded_batches(layer: Layer, module: nn.Module) -> list[Batch]:
    """Return a random batch, and if the layer takes them one with padding, and one whose tokens all choose the same experts."""
    batches = [Batch.random(layer, 2, TOKENS // 2)]
    if layer.takes_mask:
        batches.append(_padded(layer))
    with suppress(NotApplicable):
        batches.append(collapsed(layer, module, TOKENS))
    return batches


def _padded(layer: Layer) -> Batch:
    """Return a batch with a mask: padding before one sequence, and behind the other."""
    mask = torch.ones(2, TOKENS // 2, dtype=torch.bool)
    mask[0, :9] = False
    mask[1, -7:] = False
    return replace(Batch.random(layer, 2, TOKENS // 2), mask=mask)


def capacity_is_the_formula(layer: Layer) -> str:
    """Check that each expert keeps all of its assignments, or its capacity if that is less; padding takes none.

    An expert of any router keeps at most `Routing.capacity`.
    """
    module, half, most, undeclared = layer.make(), layer.make(torch.bfloat16), 0, ""
    cases = [(module, batch) for batch in crowded_batches(layer, module)]
    with suppress(NotApplicable):
        cases.append((half, collapsed(layer, half, MANY)))
    for built, batch in cases:
        with torch.no_grad():
            routing = layer.routing(layer.run(built, batch))
        real = torch.ones(len(routing.kept), dtype=torch.bool) if batch.mask is None else batch.mask.flatten()
        if bool(routing.kept[~real].any()):
            raise Failed(f"{int(routing.kept[~real].any(dim=1).sum())} padded tokens are kept")
        if routing.all_kept and not bool(routing.kept.all()):
            raise Failed(f"all_kept is True, and {int((~routing.kept).sum())} assignments are not kept")
        asked, kept = (
            torch.bincount(routing.expert[rows], minlength=layer.num_experts)
            for rows in (real.unsqueeze(-1).expand_as(routing.kept), routing.kept)
        )
        most = max(most, int(kept.max()))
        if routing.capacity is not None and int(kept.max()) > routing.capacity:
            raise Failed(f"an expert keeps {int(kept.max())}, and Routing.capacity is {routing.capacity}")
        capacity = layer.capacity(len(real)) if layer.drops else None
        expected = asked if capacity is None else asked.clamp_max(capacity)
        if torch.equal(kept, expected):
            continue
        if layer.drops is not None:
            name = "no capacity" if capacity is None else f"a capacity of {capacity}"
            raise Failed(f"asked {asked.tolist()}, kept {kept.tolist()}; {name} keeps {expected.tolist()}")
        if routing.capacity is None:
            raise NotApplicable("the layer drops tokens, and declares no capacity")
        undeclared = f", at most Routing.capacity: its {routing.capacity} for {len(real)} tokens are not declared"
    if layer.drops:
        return f"{layer.capacity(TOKENS)} of {TOKENS} tokens"
    return f"an expert takes up to {most} tokens{undeclared}"


def the_declared_tokens_are_dropped(layer: Layer) -> str:
    """Check which tokens are kept by an overfull expert."""
    if not layer.drops:
        raise NotApplicable("the layer declares no capacity" if layer.drops is None else "the layer drops no token")
    require_choice(layer)
    if layer.order is None:
        raise NotApplicable("the layer declares no order")
    module, capacity = layer.make(), layer.capacity(TOKENS)
    if capacity >= TOKENS:
        raise NotApplicable(f"an expert has a capacity of {capacity} for {TOKENS} tokens, and drops none")
    batch, expected = collapsed(layer, module, TOKENS), set(range(capacity))
    if layer.order == "score":
        logits = scores_for(torch.arange(layer.top_k).expand(TOKENS, -1), layer.num_experts, 5.0, 2.0)
        logits[:, 0] += torch.linspace(0, 1, TOKENS, dtype=torch.float64)  # the last token has the highest score
        batch, expected = batch_of_logits(layer, module, logits), set(range(TOKENS - capacity, TOKENS))
    kept = _tokens_of_expert_0(layer.routing(layer.run(module, batch)))
    if layer.order == "random":
        if kept == _tokens_of_expert_0(layer.routing(layer.run(module, batch, seed=1))):
            raise Failed(f"tokens {sorted(kept)[:8]} are kept by every draw; declared random")
        return f"{len(kept)} tokens, others by another draw"
    if kept != expected:
        raise Failed(f"kept tokens {sorted(kept)[:8]}, declared by {layer.order}: {sorted(expected)[:8]}")
    if layer.order == "position" and layer.top_k == 2:
        _first_choices_before_second(layer, module, capacity)
    return f"by {layer.order}"


def _tokens_of_expert_0(routing: Routing) -> set[int]:
    return set((routing.kept & (routing.expert == 0)).any(dim=1).nonzero().flatten().tolist())


def _first_choices_before_second(layer: Layer, module: nn.Module, capacity: int) -> None:
    """Check it with tokens of which the first half choose expert 0 second, and the others first."""
    half = TOKENS // 2
    scores = scores_for(torch.tensor([[1, 0]] * half + [[0, 2]] * half), layer.num_experts, 5.0, 10.0)
    kept = _tokens_of_expert_0(layer.routing(layer.run(module, batch_of_logits(layer, module, scores))))
    left = max(0, capacity - half)  # after all first choices
    if early := {token for token in kept if left <= token < half}:
        raise Failed(f"tokens {sorted(early)[:8]} keep a second choice; first choices leave {left}")


def padding_counts_nowhere(layer: Layer) -> str:
    """Check that values at padded places change neither the outputs of real tokens nor the auxiliary loss."""
    if not layer.takes_mask:
        raise NotApplicable("the layer takes no mask")
    module, batch, other = layer.make(), _padded(layer), Batch.random(layer, 2, TOKENS // 2, seed=5)
    assert batch.mask is not None
    x = torch.where(batch.mask.unsqueeze(-1), batch.x, 3 * other.x)
    changed = replace(batch, x=x, tokens=torch.where(batch.mask, batch.tokens, other.tokens))
    first, second = (layer.run(module, each) for each in (batch, changed))
    require_close("outputs of real tokens", second.y[batch.mask], first.y[batch.mask], 1e-6)
    if first.aux is None or second.aux is None:
        return "outputs; there is no auxiliary loss"
    require_close("the auxiliary loss, with other values of padding", second.aux, first.aux, 1e-6)
    return "outputs and auxiliary loss"
