"""Routing statistics: sums over micro-batches and ranks, and the metrics computed from them.

    sums        [E + 6] for one layer, computed on the device without a host read
    statistics  the metrics of docs/metrics.md, computed on the host

Letters: N tokens of a micro-batch, E experts of a layer, k experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nlgmoe.layers.router import Routing

SUMS = ("tokens", "kept", "entropy", "confidence", "logit_squares", "expert_share")
PERCENTILES = (10, 50, 90)


@dataclass(frozen=True)
class RoutingSums:
    """Sums of one layer over micro-batches and ranks.

    Attributes:
        requests: `[E]` assignments to each expert before dropping.
        tokens: tokens without padding.
        kept: assignments within capacity.
        entropy: entropy of the gate's distribution, nats.
        confidence: gate probability of the chosen experts, over all assignments.
        logit_squares: squares of the gate's logits.
        expert_share: weight of the experts beside the shared MLP; 0 if no mix is learned.
    """

    requests: np.ndarray
    tokens: float
    kept: float
    entropy: float
    confidence: float
    logit_squares: float
    expert_share: float

    @staticmethod
    def from_vector(sums: Sequence[float]) -> RoutingSums:
        """Build from `[E + 6]` in the order of `routing_sums`."""
        return RoutingSums(np.asarray(sums[: -len(SUMS)]), *sums[-len(SUMS) :])


@torch.no_grad()
def routing_sums(routing: Routing) -> Tensor:
    """Return the sums of one micro-batch, `[E + 6]` fp64: requests of each expert, then `SUMS`."""
    share, mask = routing.expert_share, routing.token_mask
    if share is not None and mask is not None:
        share = torch.where(mask, share, 0)
    shares = routing.weight.new_zeros(()) if share is None else share.sum()
    sums = [routing.num_tokens, routing.kept.sum(), *_gate_sums(routing), shares]
    return torch.cat([routing.tokens_per_expert.double(), torch.stack([value.double() for value in sums])])


def _gate_sums(routing: Routing) -> list[Tensor]:
    """Return entropy, confidence and squared logits; 0 if the router has no gate."""
    probs, logits, mask = routing.probs, routing.logits, routing.token_mask
    if probs is None or logits is None:
        return [routing.weight.new_zeros(())] * 3
    chosen = probs.gather(1, routing.expert)
    # -sum p log p = log(sum exp(logits)) - sum p logits: one logarithm per token, of the largest probability.
    log_total = logits.amax(dim=1) - probs.amax(dim=1).log()  # [N]
    if mask is not None:
        probs, logits, chosen = (torch.where(mask.unsqueeze(1), values, 0) for values in (probs, logits, chosen))
        log_total = torch.where(mask, log_total, 0)
    entropy = log_total.sum() - torch.dot(probs.flatten(), logits.flatten())
    return [entropy, chosen.sum(), torch.dot(logits.flatten(), logits.flatten())]


def routing_statistics(sums: RoutingSums, routing: Routing) -> dict[str, float]:
    """Compute the statistics of a layer by name.

    Args:
        sums: sums over an interval.
        routing: any of the layer; statistics of probabilities, logits and shares that it lacks are omitted.

    Returns:
        The statistics; all are NaN without a token, as in an interval of skipped steps.
    """
    requests, tokens = sums.requests, sums.tokens or math.nan
    experts, assignments = len(requests), max(1.0, requests.sum()) if sums.tokens else math.nan
    load = requests * experts / assignments  # [E], 1 is the fair share
    percentiles = np.percentile(load, PERCENTILES)
    statistics = {
        "load_max_over_mean": load.max(),
        "load_min_over_mean": load.min(),
        **{f"load_p{rank}_over_mean": value for rank, value in zip(PERCENTILES, percentiles, strict=True)},
        "load_cv": load.std(),
        "dropped": 1 - sums.kept / assignments,
    }
    if routing.probs is not None and routing.logits is not None:
        statistics |= {
            "entropy": sums.entropy / tokens / math.log(max(2, experts)),
            "confidence": sums.confidence / assignments,
            "logit_rms": math.sqrt(sums.logit_squares / tokens / experts),
        }
    if routing.expert_share is not None:
        statistics["expert_share"] = sums.expert_share / tokens
    return {name: float(value) for name, value in statistics.items()}
