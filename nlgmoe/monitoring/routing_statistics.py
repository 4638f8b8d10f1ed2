"""What a router did, in numbers: sums that add up over micro-batches and ranks, and the statistics that come of them.

    sums        [E + 6] of one layer: what a micro-batch adds on the device, with nothing read by the host
    statistics  a few numbers a person looks at, from sums that the host has read

docs/metrics.md explains each of them. Letters: N tokens of a micro-batch, E experts of a layer, k experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nlgmoe.layers.router import Routing

SUMS = ("tokens", "kept", "entropy", "confidence", "logit_squares", "expert_share")
GATE = ("entropy", "confidence", "logit_rms")  # statistics of a gate's probabilities and logits
PERCENTILES = (10, 50, 90)


@dataclass(frozen=True)
class RoutingSums:
    """What one layer's micro-batches, of all ranks, add up to.

    Attributes:
        requests: `[E]` assignments each expert was asked for, before dropping.
        tokens: that are no padding.
        kept: assignments that found a slot.
        entropy: of the gate's distribution, nats.
        confidence: the gate's probability of the experts chosen, over all assignments.
        logit_squares: squares of the gate's logits.
        expert_share: weight of the experts beside the shared MLP; 0 where no mix is learned.
    """

    requests: np.ndarray
    tokens: float
    kept: float
    entropy: float
    confidence: float
    logit_squares: float
    expert_share: float

    @staticmethod
    def of(sums: list[float]) -> RoutingSums:
        """From `[E + 6]`, as `routing_sums` orders them."""
        return RoutingSums(np.asarray(sums[: -len(SUMS)]), *sums[-len(SUMS) :])


@torch.no_grad()
def routing_sums(routing: Routing) -> Tensor:
    """What one micro-batch adds, `[E + 6]` fp64: requests of each expert, then `SUMS`."""
    share, mask = routing.expert_share, routing.token_mask
    if share is not None and mask is not None:
        share = torch.where(mask, share, 0)
    shares = routing.weight.new_zeros(()) if share is None else share.sum()
    sums = [routing.num_tokens, routing.kept.sum(), *_gate_sums(routing), shares]
    return torch.cat([routing.tokens_per_expert.double(), torch.stack([value.double() for value in sums])])


def _gate_sums(routing: Routing) -> list[Tensor]:
    """Entropy, confidence and squares of the logits; 0 where the router has no gate."""
    probs, logits, mask = routing.probs, routing.logits, routing.token_mask
    if probs is None or logits is None:  # see `has_gate`
        return [routing.weight.new_zeros(())] * 3
    chosen = probs.gather(1, routing.expert)
    # -sum p log p = log(sum exp(logits)) - sum p logits: no logarithm but of one probability a token, the largest.
    log_total = logits.amax(dim=1) - probs.amax(dim=1).log()  # [N]
    if mask is not None:
        probs, logits, chosen = (torch.where(mask.unsqueeze(1), values, 0) for values in (probs, logits, chosen))
        log_total = torch.where(mask, log_total, 0)
    entropy = log_total.sum() - torch.dot(probs.flatten(), logits.flatten())
    return [entropy, chosen.sum(), torch.dot(logits.flatten(), logits.flatten())]


def has_gate(routing: Routing) -> bool:
    """Whether the router has the probabilities and logits that its statistics are made of."""
    return routing.probs is not None and routing.logits is not None


def routing_statistics(sums: RoutingSums, mixes: bool, gated: bool = True) -> dict[str, float]:
    """The statistics of a layer, by name.

    Args:
        sums: over an interval.
        mixes: whether the layer learns the weight of its experts beside a shared MLP.
        gated: whether its router has a gate; else `GATE` is left out.
    """
    requests, tokens = sums.requests, max(1.0, sums.tokens)
    experts, asked = len(requests), max(1.0, requests.sum())
    load = requests * experts / asked  # [E], 1 is a fair share
    percentiles = np.percentile(load, PERCENTILES)
    found = {
        "load_max_over_mean": load.max(),
        "load_min_over_mean": load.min(),
        **{f"load_p{rank}_over_mean": value for rank, value in zip(PERCENTILES, percentiles, strict=True)},
        "load_cv": load.std(),
        "dropped": 1 - sums.kept / asked,
        "entropy": sums.entropy / tokens / math.log(max(2, experts)),
        "confidence": sums.confidence / asked,
        "logit_rms": math.sqrt(sums.logit_squares / tokens / experts),
    }
    if mixes:
        found["expert_share"] = sums.expert_share / tokens
    return {name: float(value) for name, value in found.items() if gated or name not in GATE}
