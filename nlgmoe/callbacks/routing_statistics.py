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
class Interval:
    """What a layer has routed in an interval, over micro-batches and ranks.

    Attributes:
        requests: `[E]` assignments to each expert, before dropping.
        tokens: tokens without padding; NaN if there was none.
    """

    requests: np.ndarray
    tokens: float

    @property
    def experts(self) -> int:
        """Number of experts, E."""
        return len(self.requests)

    @property
    def assignments(self) -> float:
        """Assignments to all experts, at least 1; NaN without a token."""
        return self.tokens if math.isnan(self.tokens) else max(1.0, float(self.requests.sum()))

    @property
    def load(self) -> np.ndarray:
        """`[E]` load of each expert: 1 is the fair share."""
        return self.requests * self.experts / self.assignments


@dataclass(frozen=True)
class Statistic:
    """One routing statistic.

    Attributes:
        value: computes it from its total and the interval.
        total: returns its sum over a micro-batch, a scalar on the device; None: it is computed from the requests alone.
        needs: fields of `Routing` that it reads; it is omitted for a router that leaves one of them None.
    """

    value: Callable[[float, Interval], float]
    total: Callable[[Any], Tensor] | None = None  # of a `Routing`
    needs: tuple[str, ...] = ()

    def is_known(self, routing: Routing) -> bool:
        """Return True if the router has returned what the statistic reads."""
        return all(getattr(routing, name) is not None for name in self.needs)


def _entropy(routing: Any) -> Tensor:
    """Sum the entropies of the gate's distributions, nats.

    -sum p log p = log(sum exp(logits)) - sum p logits: one logarithm per token, of the largest probability.
    """
    log_total = routing.logits.amax(dim=1) - routing.probs.amax(dim=1).log()  # [N]
    products = torch.dot(routing.unpadded(routing.probs).flatten(), routing.unpadded(routing.logits).flatten())
    return routing.unpadded(log_total).sum() - products


def _logit_squares(routing: Any) -> Tensor:
    logits = routing.unpadded(routing.logits).flatten()
    return torch.dot(logits, logits)


GATE = ("probs", "logits")
STATISTICS: dict[str, Statistic] = {
    "load_max_over_mean": Statistic(lambda _, interval: interval.load.max()),
    "load_min_over_mean": Statistic(lambda _, interval: interval.load.min()),
    "load_p10_over_mean": Statistic(lambda _, interval: np.percentile(interval.load, 10)),
    "load_p50_over_mean": Statistic(lambda _, interval: np.percentile(interval.load, 50)),
    "load_p90_over_mean": Statistic(lambda _, interval: np.percentile(interval.load, 90)),
    "load_cv": Statistic(lambda _, interval: interval.load.std()),
    "dropped": Statistic(
        lambda kept, interval: 1 - kept / interval.assignments, total=lambda routing: routing.kept.sum()
    ),
    "entropy": Statistic(
        lambda entropy, interval: entropy / interval.tokens / math.log(max(2, interval.experts)),
        total=_entropy,
        needs=GATE,
    ),
    "confidence": Statistic(
        lambda probability, interval: probability / interval.assignments,
        total=lambda routing: routing.unpadded(routing.probs.gather(1, routing.expert)).sum(),
        needs=GATE,
    ),
    "logit_rms": Statistic(
        lambda squares, interval: math.sqrt(squares / interval.tokens / interval.experts),
        total=_logit_squares,
        needs=GATE,
    ),
    "expert_share": Statistic(
        lambda share, interval: share / interval.tokens,
        total=lambda routing: routing.unpadded(routing.expert_share).sum(),
        needs=("expert_share",),
    ),
}
WITH_TOTAL = [name for name, statistic in STATISTICS.items() if statistic.total is not None]


@torch.no_grad()
def routing_totals(routing: Routing) -> Tensor:
    """Return the totals of one micro-batch, `[E + 1 + S]` fp64: requests of each expert, tokens, then each of `WITH_TOTAL`.

    The total of a statistic that the router does not know is 0.
    """
    totals = [routing.num_tokens]
    for statistic in (STATISTICS[name] for name in WITH_TOTAL):
        assert statistic.total is not None
        known = statistic.is_known(routing)
        totals.append(statistic.total(routing) if known else routing.weight.new_zeros(()))
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


def routing_statistics(totals: Sequence[float], routing: Routing) -> dict[str, float]:
    """Compute the statistics of a layer by name from the totals of an interval, `[E + 1 + S]`.

    Any routing of the layer tells what its router knows. All are NaN without a token, as in an interval of skipped steps.
    """
    tokens, *sums = totals[-1 - len(WITH_TOTAL) :]
    interval = Interval(requests_of(totals), tokens or math.nan)
    total = dict(zip(WITH_TOTAL, sums, strict=True))
    known = {name: statistic for name, statistic in STATISTICS.items() if statistic.is_known(routing)}
    return {name: float(statistic.value(total.get(name, 0.0), interval)) for name, statistic in known.items()}
