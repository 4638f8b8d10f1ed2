"""A weight of 1 at top-1, with a gradient for the gate.

    additive   weight = 1 + p - sg(p)      d weight / dp = 1         that of the paper's router, whose weight is p
    ratio      weight = p / sg(p)          d weight / dp = 1 / p     E times that at first, where p is 1 / E

p is the chosen expert's probability and sg stops gradients (straight-through estimators): the value of the output does not depend
on p, so neither is the gradient of a loss. The paper's router scales the output of an expert by p, 1 / E at first; `gate_scale`
scales output and gradient together, the additive form the output alone.

Letters as in `layers/router.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.router import Router, TopKRouter
from nlgmoe.parts import ROUTER_FIELDS, RouterConfig
from nlgmoe.pyramid import experts_at
from nlgmoe.validation import require, require_valid


@dataclass(frozen=True)
class UnitWeightRouterConfig(RouterConfig):
    """Settings of a top-1 router whose weights are 1.

    Attributes:
        gradient: `additive`, that of the paper's router, or `ratio`, that divided by the probability.
    """

    reads_fields = ROUTER_FIELDS - {"second_expert", "normalize_weights"}
    ignored_in_evaluation = frozenset({"gradient"})
    gradient: Literal["additive", "ratio"] = "additive"

    def __post_init__(self) -> None:
        require_valid(self)

    def check(self, moe: MoEConfig) -> None:
        """Refuse `top_k` above 1."""
        require(
            moe.top_k == 1, f"top_k={moe.top_k} must be 1 with UnitWeightRouterConfig: two weights of 1 have the sum 2"
        )

    def build(self, config: GPTConfig, block: int) -> Router:
        assert config.moe is not None
        return UnitWeightRouter(self, config.moe, config.hidden_size, experts_at(config, block), block)


class UnitWeightRouter(TopKRouter):
    """The paper's router, with a weight of 1."""

    estimated_gradient = True

    def __init__(self, settings: UnitWeightRouterConfig, moe: MoEConfig, *args: int) -> None:
        super().__init__(moe, *args)
        self.settings, self.weight_sum = settings, moe.gate_scale

    def _scores(self, logits: Tensor, probs: Tensor) -> Tensor:
        value = probs.detach().clamp_min(torch.finfo(probs.dtype).tiny)  # else 0 / 0 of experts that are not chosen
        return probs / value if self.settings.gradient == "ratio" else 1 + (probs - value)
