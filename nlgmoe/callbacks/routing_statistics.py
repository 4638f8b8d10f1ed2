"""Routing statistics of a MoE layer: one table, `STATISTICS`, in which a new one is one entry.

    total    its sum over the tokens of a micro-batch, on the device; totals are added over micro-batches and ranks
    value    the statistic (docs/metrics.md), from the totals of an interval, on the host

Letters: N tokens of a micro-batch, E experts of a layer, k experts per token, S statistics with a total.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nlgmoe.layers.router import Routing


@dataclass(frozen=True)
class Statistic:
    """One routing statistic.

    Attributes:
        value: computes it from its total, `[E]` loads (1 is the fair share), tokens without padding, and assignments.
        total: returns its sum over a micro-batch, a scalar on the device, or None if the router has not returned what it reads:
            the statistic is then omitted. None: it is computed from the loads alone.
    """

    value: Callable[[float, np.ndarray, float, float], float]
    total: Callable[[Any], Tensor | None] | None = None  # of a `Routing`


def _entropy(routing: Any) -> Tensor | None:
    """Sum the entropies of the gate's distributions, nats."""
    return None if routing.probs is None else torch.special.entr(routing.unpadded(routing.probs)).sum()


def _confidence(routing: Any) -> Tensor | None:
    return None if routing.probs is None else routing.unpadded(routing.probs.gather(1, routing.expert)).sum()


def _logit_squares(routing: Any) -> Tensor | None:
    if routing.logits is None:
        return None
    logits = routing.unpadded(routing.logits).flatten()
    return torch.dot(logits, logits)


def _expert_share(routing: Any) -> Tensor | None:
    return None if routing.expert_share is None else routing.unpadded(routing.expert_share).sum()


STATISTICS: dict[str, Statistic] = {
    "load_max_over_mean": Statistic(lambda _, load, tokens, assignments: load.max()),
    "load_min_over_mean": Statistic(lambda _, load, tokens, assignments: load.min()),
    "load_cv": Statistic(lambda _, load, tokens, assignments: load.std()),
    "dropped": Statistic(
        lambda kept, load, tokens, assignments: 1 - kept / assignments, lambda routing: routing.kept.sum()
    ),
    "entropy": Statistic(
        lambda entropy, load, tokens, assignments: entropy / tokens / math.log(max(2, len(load))), _entropy
    ),
    "confidence": Statistic(lambda probability, load, tokens, assignments: probability / assignments, _confidence),
    "logit_rms": Statistic(
        lambda squares, load, tokens, assignments: math.sqrt(squares / tokens / len(load)), _logit_squares
    ),
    "expert_share": Statistic(lambda share, load, tokens, assignments: share / tokens, _expert_share),
}
WITH_TOTAL = [name for name, statistic in STATISTICS.items() if statistic.total is not None]


@torch.no_grad()
def routing_totals(routing: Routing) -> Tensor:
    """Return the totals of one micro-batch, `[E + 1 + S]` fp64: requests of each expert, tokens, then each of `WITH_TOTAL`.

    The total of a statistic that is omitted is NaN.
    """
    totals = [routing.num_tokens]
    for statistic in (STATISTICS[name] for name in WITH_TOTAL):
        assert statistic.total is not None
        total = statistic.total(routing)
        totals.append(routing.weight.new_full((), math.nan) if total is None else total)
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
    """Compute the statistics of a layer by name from the totals of an interval, `[E + 1 + S]`.

    All are NaN without a token, as in an interval of skipped steps.
    """
    requests, (count, *sums) = requests_of(totals), totals[-1 - len(WITH_TOTAL) :]
    tokens = count or math.nan
    assignments = max(1.0, float(requests.sum())) if count else math.nan
    load = requests * len(requests) / assignments
    total = dict.fromkeys(STATISTICS, 0.0) | dict(zip(WITH_TOTAL, sums, strict=True))
    known = {name: value for name, value in total.items() if not math.isnan(value)}
    return {name: float(STATISTICS[name].value(value, load, tokens, assignments)) for name, value in known.items()}
