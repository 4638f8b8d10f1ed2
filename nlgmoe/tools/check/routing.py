"""What the experts get: weights, their order and sum, the capacity, padding, and the balance loss."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn

from nlgmoe.layers.routing import Routing
from nlgmoe.tools.check.layer import (
    Batch,
    Failed,
    Layer,
    NotApplicable,
    batch_of_choices,
    batch_of_logits,
    collapsed,
    require_choice,
    require_close,
    scores_for,
)

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
    if undeclared:
        return f"an expert keeps up to {most} tokens{undeclared}"
    return f"an expert keeps all of its tokens, here up to {most}"


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
    batch = batch_of_choices(layer, module, torch.tensor([[1, 0]] * half + [[0, 2]] * half))
    kept = _tokens_of_expert_0(layer.routing(layer.run(module, batch)))
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


def output_is_the_weighted_sum(layer: Layer) -> str:
    """Compare the output with the weighted sum of the experts, computed one by one; dropped and padded tokens get nothing."""
    errors, dropped, module = [], 0, layer.make()
    for batch in crowded_batches(layer, module):
        with torch.no_grad():
            output = layer.run(module, batch)
            routing = layer.routing(output)
            expected = layer.weighted_sum(module, batch.x.flatten(0, 1), routing)
        errors.append(require_close("sum of weight * expert(x)", output.y.flatten(0, 1), expected, 1e-5))
        dropped += int((~routing.kept.any(dim=1)).sum())
    return f"relative error {max(errors):.0e}; {dropped} tokens without an expert"


def weights_sum_as_declared(layer: Layer) -> str:
    """Sum the weights of kept choices; none is negative, and those of dropped choices are 0."""
    module, sums = layer.make(), []
    for batch in crowded_batches(layer, module):
        routing = layer.routing(layer.run(module, batch))
        weight, kept = routing.weight.detach(), routing.kept
        if not bool((weight.isfinite() & (weight >= 0)).all()):
            low, high = float(weight.min()), float(weight.max())
            raise Failed(f"weights from {low:.3g} to {high:.3g}; they must not be negative")
        if float(weight[~kept].abs().sum()) > 0:
            raise Failed("a dropped choice has a weight above 0")
        sums.append(weight.sum(dim=1)[kept.any(dim=1)])
    low, high = float(torch.cat(sums).min()), float(torch.cat(sums).max())
    require_choice(layer)
    if layer.weight_sum is None:
        raise NotApplicable(f"the layer declares no sum; it is {low:.3g} to {high:.3g}")
    if layer.weight_sum == "free":
        if high - low < 1e-4:
            raise Failed(f"the sum is {high:.4g} for every token, but weights are declared as not normalised")
        return f"not normalised: {low:.3g} to {high:.3g}"
    if abs(low - layer.weight_sum) > 1e-4 or abs(high - layer.weight_sum) > 1e-4:
        raise Failed(f"sums from {low:.4g} to {high:.4g}, declared {layer.weight_sum:g}")
    return f"{layer.weight_sum:g} for every token"


def weights_follow_the_logits(layer: Layer) -> str:
    """Check that logits far apart give weights far apart, the largest first, on experts that differ.

    The weights of a softmax of probabilities differ by a factor of e at most; a square root of softplus gives e^4 here.
    """
    require_choice(layer)
    module, top_k = layer.make(training=False), layer.top_k
    if top_k == 1:  # the same expert with all logits alike (softmax: 1 / E; sigmoid: low), and far above the others
        wanted = torch.zeros(4, 1, dtype=torch.int64)
        alike, far = (scores_for(wanted[:2], layer.num_experts, top, gap) for top, gap in ((-10.0, 0.0), (10.0, 10.0)))
        logits, least = torch.cat([alike, far]), 0.9 * layer.num_experts
        if isinstance(layer.weight_sum, float):
            raise NotApplicable(f"a token has one weight, declared as {layer.weight_sum:g}")
    else:
        generator = torch.Generator("cpu").manual_seed(4)
        wanted = torch.rand(32, layer.num_experts, generator=generator).argsort(dim=1)[:, :top_k]  # [N, k]
        # All logits are below 0, which a mask that multiplies them by 0 takes for the largest.
        logits, least = scores_for(wanted, layer.num_experts, -5.0, 8.0), 10.0
    routing = layer.routing(layer.run(module, batch_of_logits(layer, module, logits)))
    expert, order = torch.where(routing.kept, routing.expert, -1 - torch.arange(top_k)).sort(dim=1)
    if twice := int((expert.diff(dim=1) == 0).any(dim=1).sum()):
        raise Failed(f"{twice} of {len(expert)} tokens have an expert twice")
    target, place = wanted.sort(dim=1)
    follows = (expert == target).all(dim=1)
    ties = 2 if top_k == 1 else 0
    if not bool(follows[ties:].any()):
        raise NotApplicable("the choice does not follow a linear gate")
    follows[:ties] = True
    weight = routing.weight.detach().gather(1, order).gather(1, place.argsort(dim=1))[follows]  # by falling logit
    if rising := int((weight.diff(dim=1) > 1e-6).any(dim=1).sum()):
        raise Failed(f"the largest weight is not at the largest logit, for {rising} of {len(weight)} tokens")
    high, low = (weight[-1], weight[0]) if top_k == 1 else (weight[:, 0], weight[:, -1])
    if not (ratio := float((high / low.clamp_min(1e-9)).min())) >= least:
        raise Failed(f"weights of very different logits differ by a factor of {ratio:.3g}, not at least {least:.3g}")
    return f"a factor of {ratio:.3g} between weights of {len(weight)} tokens"


def balance_loss_sees_a_collapse(layer: Layer) -> str:
    """Check that collapsed routing costs E / k times as much as balanced; less if a softmax is applied to probabilities."""
    require_choice(layer)
    module, tokens = layer.make(), 4 * layer.num_experts
    first = torch.arange(tokens).view(-1, 1)
    spread = (first + torch.arange(layer.top_k)) % layer.num_experts
    values = []
    for experts in (spread, torch.arange(layer.top_k).expand(tokens, -1)):
        output = layer.run(module, batch_of_choices(layer, module, experts))
        values.append(float(output.balance.detach()))
    ratio, least = values[1] / values[0], 0.9 * layer.num_experts / layer.top_k
    text = f"{values[1]:.3g} collapsed, {values[0]:.3g} balanced"
    if not ratio >= least:
        raise Failed(f"{text}: a factor of {ratio:.3g}, not {least:.3g} or more")
    return text
