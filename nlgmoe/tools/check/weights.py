"""Weights of the experts: their sum, their order, and the weighted sum; the balance loss."""

from __future__ import annotations

import torch

from nlgmoe.tools.check.capacity import crowded_batches
from nlgmoe.tools.check.layer import (
    Failed,
    Layer,
    NotApplicable,
    batch_of_logits,
    require_choice,
    require_close,
    scores_for,
)  # fmt: skip


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
            raise Failed(
                f"weights from {float(weight.min()):.3g} to {float(weight.max()):.3g}; they must not be negative"
            )
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

    The weights of a softmax of probabilities differ by a factor of e at most.
    """
    require_choice(layer)
    module, top_k = layer.make(training=False), layer.top_k
    if top_k == 1:  # the same expert with all logits alike (softmax: 1 / E; sigmoid: low), and far above the others
        wanted = torch.zeros(4, 1, dtype=torch.int64)
        alike, far = (scores_for(wanted[:2], layer.num_experts, top, gap) for top, gap in ((-10.0, 0.0), (10.0, 10.0)))
        logits, least = torch.cat([alike, far]), 0.9 * layer.num_experts
    else:
        generator = torch.Generator("cpu").manual_seed(4)
        wanted = torch.rand(32, layer.num_experts, generator=generator).argsort(dim=1)[:, :top_k]  # [N, k]
        # All logits are below 0, which a mask that multiplies them by 0 takes for the largest.
        logits, least = scores_for(wanted, layer.num_experts, -5.0, 8.0), 100.0
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
        batch = batch_of_logits(layer, module, scores_for(experts, layer.num_experts, 5.0, 10.0))
        values.append(float(layer.run(module, batch).balance.detach()))
    ratio, least = values[1] / values[0], 0.9 * layer.num_experts / layer.top_k
    if not ratio >= least:
        raise Failed(
            f"{values[1]:.3g} collapsed, {values[0]:.3g} balanced: a factor of {ratio:.3g}, not {least:.3g} or more"
        )
    return f"{values[1]:.3g} collapsed, {values[0]:.3g} balanced"
