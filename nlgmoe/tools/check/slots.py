"""Slots of the experts: how many there are, who gets them, and padding, which gets none."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from nlgmoe.layers.router import Routing
from nlgmoe.tools.check.layer import (
    Batch,
    Failed,
    Layer,
    NotApplicable,
    everyone_to,
    require_choice,
    require_close,
    scores_for,
    steered,
)

TOKENS = 44  # of which an expert's fair share is no whole number
MANY = 4096  # tokens, of which bf16 cannot count an expert's


def _kept(routing: Routing, num_experts: int) -> Tensor:
    return torch.bincount(routing.expert[routing.kept], minlength=num_experts)


def _requests(routing: Routing, real: Tensor | None, num_experts: int) -> Tensor:
    expert = routing.expert if real is None else routing.expert[real]
    return torch.bincount(expert.flatten(), minlength=num_experts)


def _slots(layer: Layer, tokens: int, kept: Tensor) -> int | None:
    """Return the slots of an expert; None where nothing is dropped."""
    if layer.drops is None and not bool(kept.all()):
        raise NotApplicable("the layer drops tokens, and declares no capacity")
    return layer.capacity(tokens) if layer.drops else None


def capacity_is_the_formula(layer: Layer) -> str:
    """Check that each expert keeps as many assignments as are asked of it, or its capacity if that is less."""
    module = layer.make()
    loads = []
    cases = [(module, Batch.random(layer, 2, TOKENS // 2))]
    if layer.gate_weight(module) is not None:
        half = layer.make(torch.bfloat16)
        cases += [(module, everyone_to(layer, module, TOKENS)), (half, everyone_to(layer, half, MANY))]
    for built, batch in cases:
        with torch.no_grad():
            routing = layer.routing(layer.run(built, batch))
        asked, kept = _requests(routing, None, layer.num_experts), _kept(routing, layer.num_experts)
        slots = _slots(layer, len(routing.kept), routing.kept)
        expected = asked if slots is None else asked.clamp_max(slots)
        if not torch.equal(kept, expected):
            name = "no capacity" if slots is None else f"a capacity of {slots}"
            raise Failed(f"asked {asked.tolist()}, kept {kept.tolist()}; {name} keeps {expected.tolist()}")
        if routing.all_kept and not bool(routing.kept.all()):
            raise Failed(f"all_kept is True, and {int((~routing.kept).sum())} assignments are dropped")
        if routing.capacity is not None and int(kept.max()) > routing.capacity:
            raise Failed(f"an expert keeps {int(kept.max())}, and Routing.capacity is {routing.capacity}")
        loads.append(int(kept.max()))
    if not layer.drops:
        return f"dropless: an expert took up to {max(loads)} tokens"
    return f"{layer.capacity(TOKENS)} slots for {TOKENS} tokens"


def dropped_tokens_give_zero(layer: Layer) -> str:
    """Check that a token without a kept choice gets nothing from the experts."""
    module = layer.make()
    batch = everyone_to(layer, module, TOKENS)
    with torch.no_grad():
        output = layer.run(module, batch)
        routing = layer.routing(output)
        dropped = ~routing.kept.any(dim=1)
        if not bool(dropped.any()):
            raise NotApplicable("the layer drops no token")
        x = batch.x.flatten(0, 1)
        expected = layer.join(module, x, torch.zeros_like(x))
    difference = float((output.y.flatten(0, 1) - expected)[dropped].abs().max())
    if not difference <= 1e-6:
        raise Failed(f"a dropped token gets up to {difference:.3g} from the experts")
    return f"{int(dropped.sum())} dropped tokens"


def the_declared_tokens_are_dropped(layer: Layer) -> str:
    """Check who keeps the slots of an overfull expert."""
    if not layer.drops:
        raise NotApplicable("the layer declares no capacity" if layer.drops is None else "the layer drops no token")
    require_choice(layer)
    if layer.order is None:
        raise NotApplicable("the layer declares no order")
    module, slots, tokens = layer.make(), layer.capacity(TOKENS), TOKENS
    if slots >= tokens:
        raise NotApplicable(f"an expert has {slots} slots for {tokens} tokens, and drops none")
    if layer.order == "score":
        logits = scores_for(torch.arange(layer.top_k).expand(tokens, -1), layer.num_experts, 5.0, 2.0)
        logits[:, 0] += torch.linspace(0, 1, tokens, dtype=torch.float64)  # the last token has the highest score
        routing = layer.routing(layer.run(module, steered(layer, module, logits)))
        expected = set(range(tokens - slots, tokens))
    else:
        routing = layer.routing(layer.run(module, everyone_to(layer, module, tokens)))
        expected = set(range(slots))
    found = _tokens_of(routing, 0)
    if layer.order == "random":
        others = _tokens_of(layer.routing(layer.run(module, everyone_to(layer, module, tokens), seed=1)), 0)
        if found == others:
            raise Failed(f"tokens {sorted(found)[:8]} are kept by every draw; declared random")
        return f"{len(found)} tokens, others by another draw"
    if found != expected:
        raise Failed(f"kept tokens {sorted(found)[:8]}, declared by {layer.order}: {sorted(expected)[:8]}")
    if layer.order == "position" and layer.top_k == 2:
        _first_choices_before_second(layer, module, slots)
    return f"by {layer.order}"


def _tokens_of(routing: Routing, expert: int) -> set[int]:
    return set((routing.kept & (routing.expert == expert)).any(dim=1).nonzero().flatten().tolist())


def _first_choices_before_second(layer: Layer, module: nn.Module, slots: int) -> None:
    """Check it with tokens of which the first half choose expert 0 second, and the others first."""
    half = TOKENS // 2
    experts = torch.tensor([[1, 0]] * half + [[0, 2]] * half)
    routing = layer.routing(
        layer.run(module, steered(layer, module, scores_for(experts, layer.num_experts, 5.0, 10.0)))
    )
    left = max(0, slots - half)  # after all first choices
    if early := {token for token in _tokens_of(routing, 0) if left <= token < half}:
        raise Failed(f"tokens {sorted(early)[:8]} keep a second choice; first choices leave {left} slots")


def padding_takes_no_slot(layer: Layer) -> str:
    """Check that real tokens keep as many slots as if padding asked for none, and that padding gets nothing."""
    module, batch = layer.make(), _padded(layer)
    with torch.no_grad():
        output = layer.run(module, batch)
        routing = layer.routing(output)
        assert batch.mask is not None
        real, x = batch.mask.flatten(), batch.x.flatten(0, 1)
        if bool(routing.kept[~real].any()):
            raise Failed(f"{int(routing.kept[~real].any(dim=1).sum())} padded tokens take slots")
        if routing.all_kept:
            raise Failed("all_kept is True, and padding is not kept")
        asked, kept = _requests(routing, real, layer.num_experts), _kept(routing, layer.num_experts)
        slots = _slots(layer, TOKENS, routing.kept[real])
        expected = asked if slots is None else asked.clamp_max(slots)
        if not torch.equal(kept, expected):
            raise Failed(f"real tokens asked {asked.tolist()}, and kept {kept.tolist()}, not {expected.tolist()}")
        nothing = layer.join(module, x, torch.zeros_like(x))
        rest = float((output.y.flatten(0, 1) - nothing)[~real].abs().max())
    if not rest <= 1e-6:
        raise Failed(f"a padded token gets up to {rest:.3g} from the experts")
    return f"{int((~real).sum())} of {TOKENS} tokens are padding"


def padding_counts_nowhere(layer: Layer) -> str:
    """Check that values at padded places change neither the outputs of real tokens nor the auxiliary loss."""
    module, batch = layer.make(), _padded(layer)
    assert batch.mask is not None
    other = Batch.random(layer, 2, TOKENS // 2, seed=5)
    changed = replace(
        batch,
        x=torch.where(batch.mask.unsqueeze(-1), batch.x, 3 * other.x),
        tokens=torch.where(batch.mask, batch.tokens, other.tokens),
    )
    one, two = (layer.run(module, each) for each in (batch, changed))
    require_close("outputs of real tokens", two.y[batch.mask], one.y[batch.mask], 1e-6)
    if one.aux is None or two.aux is None:
        return "outputs; there is no auxiliary loss"
    require_close("the auxiliary loss, with other values of padding", two.aux, one.aux, 1e-6)
    return "outputs and auxiliary loss"


def _padded(layer: Layer) -> Batch:
    """Return a batch with a mask: padding before one sequence, and behind the other."""
    if not layer.takes_mask:
        raise NotApplicable("the layer takes no mask")
    batch = Batch.random(layer, 2, TOKENS // 2)
    mask = torch.ones(2, TOKENS // 2, dtype=torch.bool)
    mask[0, :9] = False
    mask[1, -7:] = False
    return replace(batch, mask=mask)
