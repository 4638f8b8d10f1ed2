"""Scores of single experts, and balance by a bias on the choice instead of a loss: DeepSeek-V3's router.

    s      = sigmoid(x W)                                         [N, E]   or another of `SCORES`
    expert = the top k of s + b                                   [N, k]   b changes the choice, not the weights; with `groups`
                                                                           G, g: of the g groups with the largest sums of
                                                                           their two highest s + b
    weight = gate_scale * s[expert] / sum_k s[expert]             [N, k]   the sum if k > 1 (`normalize_weights`)
    b     += update_rate * sign(mean load - load)                 [E]      after each optimizer step; or by a smooth rule:

    d = tanh(smooth * (mean load - load) / mean load)             [E]      `smooth` given: SMEBU
    m = momentum * m + (1 - momentum) * (d - mean(d)),   b += update_rate * m

    sequence balance = sequence_loss_coeff * mean over sequences of sum_e f_e P_e
    P_e = mean_t s_te / sum_e s_te          f_e = E / k * share of the tokens t of a sequence whose top k of s include e

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2, equations 12 to 20); Loss-Free Balancing (arXiv 2408.15664, algorithm 1); the smooth
rule: Trinity (arXiv 2602.17004, soft-clamped momentum expert bias updates). The load is the number of assignments to an expert in
the step, over all ranks and micro-batches, before dropping. tests/equivalence compares with `transformers`. `Routing.logits` is
log s, whose softmax is s / sum_e s, `Routing.probs`.

Letters as in `layers/router.py`, whose capacity it uses; B sequences of T tokens, N = B * T.
"""

from __future__ import annotations

from collections.abc import Callable
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
from nlgmoe.validation import require, require_at_least, require_valid


def log_sqrt_softplus(z: Tensor) -> Tensor:
    """Compute `log(sqrt(softplus(z)))`; below -15 it is z / 2 within 2e-7, where softplus would underflow."""
    return 0.5 * torch.where(z < -15, z, F.softplus(z.clamp_min(-15)).log())


Score = Literal["sigmoid", "sqrtsoftplus", "softmax"]
SCORES: dict[Score, Callable[[Tensor], Tensor]] = {  # logits -> log s, `[N, E]`
    "sigmoid": F.logsigmoid,
    "sqrtsoftplus": log_sqrt_softplus,  # DeepSeek-V4
    "softmax": lambda logits: F.log_softmax(logits, dim=-1),
}


@dataclass(frozen=True)
class SigmoidRouterConfig(RouterConfig):
    """Settings of a router with a score of each expert and a balancing bias.

    Attributes:
        update_rate: step of an expert's bias after each optimizer step; 0: no balancing by biases.
        sequence_loss_coeff: weight of the sequence-wise balance loss, which is summed over the MoE layers.
        scores: function of the gate's logits: `sigmoid`, `sqrtsoftplus` or `softmax`.
        smooth: factor of the relative error of an expert's load in the tanh of the smooth rule (Trinity: 2); null: its sign.
        momentum: of the smooth rule, from 0 to below 1.
    """

    reads_fields = frozenset(
        {
            *("token_dropping", "train_capacity_factor", "eval_token_dropping", "eval_capacity_factor"),
            *("min_capacity", "random_token_selection", "groups", "normalize_weights", "gate_scale", "gate_init_std"),
        }
    )
    ignored_in_evaluation = frozenset({"update_rate", "sequence_loss_coeff", "momentum"})
    update_rate: float = 1e-3
    sequence_loss_coeff: float = 0.0
    scores: Score = "sigmoid"
    smooth: float | None = None
    momentum: float = 0.5

    def __post_init__(self) -> None:
        require_valid(self)
        require_at_least(0, self, "update_rate", "sequence_loss_coeff", remedy="; 0 turns it off")
        require(
            self.smooth is None or self.smooth > 0, f"smooth={self.smooth} must be above 0, or null for the sign rule"
        )
        require(0 <= self.momentum < 1, f"momentum={self.momentum} must be at least 0 and below 1")

    def check(self, moe: MoEConfig) -> None:
        counts = moe.num_experts if isinstance(moe.num_experts, list) else [moe.num_experts]
        require(
            moe.groups is None or moe.groups[0] * 2 <= min(count for count in counts if count),
            f"groups={moe.groups} must leave 2 experts a group with SigmoidRouterConfig (num_experts={moe.num_experts})",
        )

    def build(self, config: GPTConfig, block: int) -> Router:
        return SigmoidRouter(self, config, block)


class ScoreRouter(TopKRouter):
    """The paper's router with a score of each expert in place of the softmax: the weights, before they are normalised."""

    def __init__(self, scores: Score, config: GPTConfig, block: int) -> None:
        assert config.moe is not None
        super().__init__(config.moe, config.hidden_size, experts_at(config, block), block)
        self.scores = scores

    def _logits(self, x: Tensor) -> Tensor:
        return SCORES[self.scores](super()._logits(x))

    def _scores(self, logits: Tensor, probs: Tensor) -> Tensor:
        return logits.exp()


class SigmoidRouter(ScoreRouter):
    """A choice by biased scores."""

    bias: Tensor
    momentum: Tensor

    def __init__(self, settings: SigmoidRouterConfig, config: GPTConfig, block: int) -> None:
        super().__init__(settings.scores, config, block)
        self.settings = settings
        self.register_buffer("bias", torch.zeros(self.num_experts))
        if settings.smooth is not None:
            self.register_buffer("momentum", torch.zeros(self.num_experts))

    def forward(self, x: Tensor, context: RoutingContext = RoutingContext()) -> Routing:  # noqa: B008 (frozen)
        """Route `x`, `[N, H]`."""
        routing, coefficient = super().forward(x, context), self.settings.sequence_loss_coeff
        if not (coefficient and self.training):
            return routing
        assert routing.probs is not None
        sequences = context.num_sequences(len(x))
        loss = coefficient * sequence_balance(routing.probs, self.config.top_k, sequences, routing.token_mask)
        return replace(routing, losses={"sequence_balance_loss": loss})

    def after_step(self, requests: Tensor) -> None:
        settings, error = self.settings, requests.sum() - self.num_experts * requests  # [E], times E
        if settings.smooth is None:
            self.bias += settings.update_rate * error.sign()
            return
        change = torch.tanh(settings.smooth * error / requests.sum().clamp_min(1))  # [E]
        self.momentum.lerp_(change - change.mean(), 1 - settings.momentum)
        self.bias += settings.update_rate * self.momentum

    def _choose(self, logits: Tensor, context: RoutingContext, draw: RoutingNoise) -> Tensor:
        scores = self._selectable(logits.detach().exp() + self.bias, summed=2)
        return scores.topk(self.config.top_k, dim=-1).indices


def sequence_balance(probs: Tensor, top_k: int, sequences: int, token_mask: Tensor | None) -> Tensor:
    """Compute the sequence-wise balance loss without its coefficient, a scalar: 1 if balanced.

    `probs` `[N, E]` are scores over their sum, of B `sequences`; `token_mask` `[N]` is False at padding; None: no padding.
    """
    chosen = torch.zeros_like(probs).scatter_(1, probs.detach().topk(top_k, dim=-1).indices, 1)  # [N, E]
    ones = torch.ones_like(probs[:, :1])  # [N, 1]
    counted = ones if token_mask is None else token_mask.unsqueeze(-1).to(probs.dtype)
    columns = torch.cat([chosen, probs, ones], dim=1) * counted
    sums = columns.unflatten(0, (sequences, len(columns) // max(sequences, 1))).sum(dim=1)  # [B, 2 E + 1]
    requested, scored, tokens = sums.split([probs.shape[1], probs.shape[1], 1], dim=1)
    tokens = tokens.clamp_min(1)
    return probs.shape[1] / top_k * (requested / tokens * scored / tokens).sum() / max(sequences, 1)
