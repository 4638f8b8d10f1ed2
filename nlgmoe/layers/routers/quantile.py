"""Balance by quantiles: after each step an expert gets the bias with which its share of the step's tokens would have chosen it.

    s      = sigmoid(x W), or the logits x W                      [N, E]
    expert = the top k of s + b                                   [N, k]
    weight = of the sigmoids as in `sigmoid.py`, of the logits as in `layers/router.py`; b does not change it

    a_n    = the (k + 1)-th largest of s_n + b                    [N]      what an expert has to exceed to be chosen
    r_ne   = a_n - s_ne                                           [N, E]   the bias at which token n would choose expert e
    b_e    = the k / E quantile over n of r_ne;   b -= mean(b)    [E]      after each optimizer step

Quantiles of all ranks and micro-batches together are read from a histogram, `Routing.statistic`: counts of r in `BINS` equal bins
of `[min b - 1, max b + 1]`, which contains it if s is a sigmoid; of logits the bins are equal in r / (1 + |r|). Within a bin the
counts are taken to be spread evenly. An average of the ranks' quantiles would be another number.

Kimi K3; torchtitan#4577, Megatron-LM#6637 (sigmoids, histograms); Megatron-LM#5349 (logits, averaged quantiles).

Letters as in `layers/router.py`, whose capacity it uses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.router import Router, TopKRouter
from nlgmoe.layers.routing import Routing, RoutingContext
from nlgmoe.parts import RouterConfig
from nlgmoe.pyramid import experts_at
from nlgmoe.seeding import RoutingNoise
from nlgmoe.validation import require, require_valid

BINS = 1000


@dataclass(frozen=True)
class QuantileRouterConfig(RouterConfig):
    """Settings of a router that balances by quantiles.

    Attributes:
        scores: what the bias is added to: `sigmoid` of the gate's logits, or the `logits`, whose softmax are then the weights.
    """

    reads_fields = frozenset(
        {
            *("token_dropping", "train_capacity_factor", "eval_token_dropping", "eval_capacity_factor"),
            *("min_capacity", "random_token_selection", "normalize_weights", "gate_scale", "gate_init_std"),
        }
    )
    scores: Literal["sigmoid", "logits"] = "sigmoid"

    def __post_init__(self) -> None:
        require_valid(self)

    def check(self, moe: MoEConfig) -> None:
        """Refuse layers in which a token chooses every expert: nothing is left to exceed."""
        counts = moe.num_experts if isinstance(moe.num_experts, list) else [moe.num_experts]
        fewest = min(count for count in counts if count)
        require(moe.top_k < fewest, f"top_k={moe.top_k} must be below num_experts={fewest} with QuantileRouterConfig")

    def build(self, config: GPTConfig, block: int) -> Router:
        return QuantileRouter(self, config, block)


class QuantileRouter(TopKRouter):
    """A choice by scores with a bias that is a quantile of the last step."""

    bias: Tensor

    def __init__(self, settings: QuantileRouterConfig, config: GPTConfig, block: int) -> None:
        assert config.moe is not None
        super().__init__(config.moe, config.hidden_size, experts_at(config, block), block)
        self.sigmoid = settings.scores == "sigmoid"
        self.register_buffer("bias", torch.zeros(self.num_experts))

    def forward(self, x: Tensor, context: RoutingContext = RoutingContext()) -> Routing:  # noqa: B008 (frozen)
        """Route `x`, `[N, H]`; in training with the histogram `[E, BINS]` of the biases that would have been enough."""
        routing = super().forward(x, context)
        return replace(routing, statistic=self._histogram(routing)) if self.training else routing

    def after_step(self, statistic: Tensor) -> None:
        cumulative = statistic.cumsum(1)  # [E, BINS]
        tokens = cumulative[:, -1]  # [E]: the same number N of all ranks and micro-batches
        rank = (self.config.top_k * tokens + self.num_experts - 1) // self.num_experts  # ceil(k N / E)
        bins = (cumulative < rank.unsqueeze(1)).sum(1, keepdim=True).clamp_max(BINS - 1)  # [E, 1]
        inside = statistic.gather(1, bins)  # [E, 1]
        share = (rank.unsqueeze(1) - cumulative.gather(1, bins) + inside) / inside.clamp_min(1)  # of the bin's counts
        bias = self._from_unit((bins + share).squeeze(1) / BINS)  # [E]
        self.bias.copy_(torch.where(tokens > 0, bias - bias.mean(), self.bias))

    @torch.no_grad()
    def _histogram(self, routing: Routing) -> Tensor:
        assert routing.logits is not None
        scores = self._biasable(routing.logits)  # [N, E]
        exceeded = (scores + self.bias).topk(self.config.top_k + 1, dim=-1).values[:, -1:]  # [N, 1]
        bins = (self._to_unit(exceeded - scores) * BINS).long().clamp(0, BINS - 1)  # [N, E]
        counts = routing.unpadded(torch.ones_like(bins))  # [N, E]
        return bins.new_zeros(self.num_experts, BINS).scatter_add_(1, bins.t(), counts.t())

    def _to_unit(self, value: Tensor) -> Tensor:
        """Map biases to [0, 1], in which bins are equal."""
        if not self.sigmoid:
            return (F.softsign(value) + 1) / 2
        low, high = self.bias.min() - 1, self.bias.max() + 1
        return (value - low) / (high - low)

    def _from_unit(self, value: Tensor) -> Tensor:
        """Undo `_to_unit`."""
        if not self.sigmoid:
            signed = 2 * value - 1
            return signed / (1 - signed.abs()).clamp_min(1 / BINS)
        low, high = self.bias.min() - 1, self.bias.max() + 1
        return low + value * (high - low)

    def _logits(self, x: Tensor) -> Tensor:
        logits = super()._logits(x)
        return F.logsigmoid(logits) if self.sigmoid else logits

    def _scores(self, logits: Tensor, probs: Tensor) -> Tensor:
        return logits.exp() if self.sigmoid else probs

    def _biasable(self, logits: Tensor) -> Tensor:
        """Return what the bias is added to, `[N, E]`."""
        return logits.detach().exp() if self.sigmoid else logits.detach()

    def _choose(self, logits: Tensor, context: RoutingContext, draw: RoutingNoise) -> Tensor:
        return self._selectable(self._biasable(logits) + self.bias).topk(self.config.top_k, dim=-1).indices
