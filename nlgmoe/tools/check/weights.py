"""Weights of the experts: their sum, their range, and their way into the output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nlgmoe.tools.check.layer import (
    Batch,
    Failed,
    Layer,
    NotApplicable,
    require_choice,
    require_close,
    scores_for,
    steered,
)


def output_is_the_weighted_sum(layer: Layer) -> str:
    """Compare the output with the weighted sum of the experts, computed one by one; a dropped assignment adds nothing."""
    module = layer.make()
    batch = Batch.random(layer, 4, 16)
    with torch.no_grad():
        output = layer.run(module, batch)
        routing, x = layer.routing(output), batch.x.flatten(0, 1)
        experts = torch.zeros_like(x)
        for index in range(layer.num_experts):
            alone = layer.expert(module, index, x)
            if alone is None:
                raise NotApplicable("the layer does not give one expert alone")
            weight = torch.where(routing.kept & (routing.expert == index), routing.weight, 0).sum(dim=1, keepdim=True)
            experts += weight * alone
        expected = layer.join(module, x, experts)
    error = require_close("sum of weight * expert(x)", output.y.flatten(0, 1), expected, 1e-5)
    return f"relative error {error:.0e}"


def weights_sum_as_declared(layer: Layer) -> str:
    """Sum the weights of kept choices."""
    module = layer.make()
    routing = layer.routing(layer.run(module, Batch.random(layer, 4, 16)))
    weight, kept = routing.weight.detach(), routing.kept
    if not bool((weight.isfinite() & (weight >= 0)).all()):
        raise Failed(f"weights from {float(weight.min()):.3g} to {float(weight.max()):.3g}; they must not be negative")
    if float(weight[~kept].abs().sum()) > 0:
        raise Failed("a dropped choice has a weight above 0")
    sums = weight.sum(dim=1)[kept.any(dim=1)]
    low, high = float(sums.min()), float(sums.max())
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


def _ask(layer: Layer, module: nn.Module, experts: list[int], top: float, gap: float) -> Tensor:
    """Return the weights of one token whose largest logits are at `experts`, `[k]`."""
    logits = scores_for(torch.tensor([experts]).expand(4, -1), layer.num_experts, top, gap)
    routing = layer.routing(layer.run(module, steered(layer, module, logits)))
    if gap and routing.expert[0].sort().values.tolist() != sorted(experts):
        raise NotApplicable("the choice does not follow a linear gate")
    return routing.weight[0].detach()


def gate_is_not_squashed_twice(layer: Layer) -> str:
    """Check that logits far apart give weights far apart; those of a softmax of probabilities differ by a factor of e at most."""
    require_choice(layer)
    module = layer.make(training=False)
    chosen = list(range(layer.top_k))
    if layer.top_k == 1:
        # softmax: 1 / E where all are alike; sigmoid: 0 where all are low
        low, high = float(_ask(layer, module, chosen, -10.0, 0.0)), float(_ask(layer, module, chosen, 10.0, 10.0))
        ratio, least = high / max(low, 1e-9), 0.9 * layer.num_experts
    else:
        weight = _ask(layer, module, chosen, -5.0, 8.0)
        ratio, least = float(weight.max() / weight.min().clamp_min(1e-9)), 100.0
    if not ratio >= least:
        raise Failed(
            f"weights of very different logits differ by a factor of {ratio:.3g}; at least {least:.3g} are due"
        )
    return f"a factor of {ratio:.3g} between weights"


def likelier_experts_weigh_more(layer: Layer) -> str:
    """Check that a token's experts differ, and that the expert with the larger logit has the larger weight."""
    require_choice(layer)
    if layer.top_k == 1:
        raise NotApplicable("one expert a token")
    module = layer.make(training=False)
    generator = torch.Generator("cpu").manual_seed(4)
    wanted = torch.rand(32, layer.num_experts, generator=generator).argsort(dim=1)[:, : layer.top_k]  # [N, k]
    # All logits are below 0, which a mask that multiplies them by 0 takes for the largest.
    batch = steered(layer, module, scores_for(wanted, layer.num_experts, -1.0, 1.0))
    routing = layer.routing(layer.run(module, batch))
    expert, order = torch.where(routing.kept, routing.expert, -1 - torch.arange(layer.top_k)).sort(dim=1)
    if twice := int((expert.diff(dim=1) == 0).any(dim=1).sum()):
        raise Failed(f"{twice} of {len(expert)} tokens have an expert twice")
    target, place = wanted.sort(dim=1)
    follows = (expert == target).all(dim=1)
    if not bool(follows.any()):
        raise NotApplicable("the choice does not follow a linear gate")
    weight = routing.weight.detach().gather(1, order).gather(1, place.argsort(dim=1))[follows]  # by falling logit
    if rising := int((weight.diff(dim=1) > 1e-6).any(dim=1).sum()):
        raise Failed(f"the largest weight is not at the largest logit, for {rising} of {len(weight)} tokens")
    return f"{int(follows.sum())} tokens"


def balance_loss_sees_a_collapse(layer: Layer) -> str:
    """Check that collapsed routing costs E / k times as much as balanced; less with probabilities squashed twice."""
    require_choice(layer)
    module, tokens = layer.make(), 4 * layer.num_experts
    first = torch.arange(tokens).view(-1, 1)
    spread = (first + torch.arange(layer.top_k)) % layer.num_experts
    values = []
    for experts in (spread, torch.arange(layer.top_k).expand(tokens, -1)):
        batch = steered(layer, module, scores_for(experts, layer.num_experts, 5.0, 10.0))
        values.append(float(layer.run(module, batch).balance.detach()))
    ratio, least = values[1] / values[0], 0.9 * layer.num_experts / layer.top_k
    if not ratio >= least:
        raise Failed(
            f"{values[1]:.3g} collapsed, {values[0]:.3g} balanced: a factor of {ratio:.3g}, {least:.3g} are due"
        )
    return f"{values[1]:.3g} collapsed, {values[0]:.3g} balanced"


def gate_scale_reaches_the_output(layer: Layer) -> str:
    """Check that a gate that is 1.5 times as large changes the output, though not the choices."""
    require_choice(layer)
    module = layer.make(training=False)
    weight = layer.gate_weight(module)
    if weight is None:
        raise NotApplicable("the router has no linear gate")
    batch = Batch.random(layer, 2, 12)
    with torch.no_grad():
        before = layer.run(module, batch)
        weight.mul_(1.5)
        after = layer.run(module, batch)
    change = (after.y - before.y).norm(dim=-1) / before.y.norm(dim=-1).clamp_min(1e-9)  # [B, T]
    share = float((change > 1e-4).double().mean())
    if share < 0.5:
        raise Failed(f"only {share:.0%} of the outputs change with the scale of the gate")
    return f"changes {share:.0%} of the outputs"
