"""Routing statistics of a MoE layer: their sums over the tokens of a micro-batch, and the statistics of an interval.

The sums are computed on the device, and added over micro-batches and ranks; the statistics (docs/report.md) on the host. A new
one that needs a sum has it in `WITH_TOTAL` and `routing_totals`.

Letters: N tokens of a micro-batch, E experts of a layer, k experts per token, S statistics with a sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nlgmoe.layers.routing import Routing

WITH_TOTAL = ("dropped", "entropy", "confidence", "logit_rms", "expert_share")


@torch.no_grad()
def routing_totals(routing: Routing) -> Tensor:
    """Return the sums of one micro-batch, `[E + 1 + S]` fp64: requests of each expert, tokens, then one for each of `WITH_TOTAL`.

    NaN stands for a statistic whose tensor the router has not returned.
    """
    unknown = routing.weight.new_full((), math.nan)
    probs, logits, share = (
        None if value is None else routing.unpadded(value)
        for value in (routing.probs, routing.logits, routing.expert_share)
    )
    totals = [
        routing.num_tokens,
        routing.kept.sum(),
        unknown if probs is None else torch.special.entr(probs).sum(),  # nats
        unknown if probs is None else probs.gather(1, routing.expert).sum(),
        unknown if logits is None else torch.dot(logits.flatten(), logits.flatten()),
        unknown if share is None else share.sum(),
    ]
    return torch.cat([routing.tokens_per_expert.double(), torch.stack([total.double() for total in totals])])


def split_totals(totals: Sequence[float], experts: Sequence[int]) -> list[Sequence[float]]:
    """Split concatenated totals, which more may follow, by layer; `experts` has each layer's number of experts."""
    layers, begin = [], 0
    for count in experts:
        end = begin + count + 1 + len(WITH_TOTAL)
        layers.append(totals[begin:end])
        begin = end
    return layers


def requests_of(totals: Sequence[float]) -> np.ndarray:
    """Return the requests of a layer's totals, `[E]`."""
    return np.asarray(totals[: -1 - len(WITH_TOTAL)])


def routing_statistics(totals: Sequence[float]) -> dict[str, float]:
    """Compute the statistics of a layer by name from the sums of an interval, `[E + 1 + S]`.

    Without the router's tensor for it a statistic is left out. All are NaN without a token, as in an interval of skipped steps.
    """
    requests, (count, kept, entropy, probability, squares, share) = requests_of(totals), totals[-1 - len(WITH_TOTAL) :]
    tokens = count or math.nan
    assignments = max(1.0, float(requests.sum())) if count else math.nan
    load = requests * len(requests) / assignments  # [E]; 1 is the fair share
    always = {
        "load_max_over_mean": float(load.max()),
        "load_min_over_mean": float(load.min()),
        "load_cv": float(load.std()),
        "dropped": 1 - kept / assignments,
    }
    of_router = {
        "entropy": entropy / tokens / math.log(max(2, len(load))),
        "confidence": probability / assignments,
        "logit_rms": math.sqrt(squares / tokens / len(load)),
        "expert_share": share / tokens,
    }
    with_sums = zip(of_router.items(), (entropy, probability, squares, share), strict=True)
    return always | {name: value for (name, value), total in with_sums if not math.isnan(total)}
