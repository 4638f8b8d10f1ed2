"""The paper's router with settings for scale, initial standard deviation and normalisation of the gate.

    p      = softmax(x W)                                [N, E]   W ~ N(0, init_std) at first
    weight = gate_scale * p[expert]                      [N, k]   `normalize_weights` false
    weight = gate_scale * p[expert] / sum_k p[expert]    [N, k]   `normalize_weights` true

Mixtral (arXiv 2401.04088) and Qwen3-MoE normalise, OLMoE (arXiv 2409.02060) does not; tests/equivalence compares with
all three. Letters as in `layers/router.py`; `TopKRouter` there implements it.
"""

from __future__ import annotations

from dataclasses import dataclass

from nlgmoe.config import ROUTER_FIELDS, GPTConfig, MoEConfig
from nlgmoe.layers.router import Router, TopKRouter
from nlgmoe.parts import RouterConfig
from nlgmoe.pyramid import experts_at
from nlgmoe.validation import require, require_valid


@dataclass(frozen=True)
class SoftmaxTopK(RouterConfig):
    """Settings of a router with a softmax gate.

    Attributes:
        gate_scale: multiplies the weights of the experts' outputs.
        init_std: standard deviation of the gate's initial weights; null: the model's `init_std`.
        normalize_weights: the weights of a token's kept experts sum to `gate_scale`; null: true if `top_k` is above 1.
    """

    uses = ROUTER_FIELDS
    free_in_evaluation = frozenset({"init_std"})
    gate_scale: float = 1.0
    init_std: float | None = None
    normalize_weights: bool | None = None

    def __post_init__(self) -> None:
        require_valid(self)
        require(self.gate_scale > 0, f"gate_scale={self.gate_scale} must be above 0")
        require(self.init_std is None or self.init_std > 0, f"init_std={self.init_std} must be above 0")

    def check(self, moe: MoEConfig) -> None:
        """See `RouterConfig`."""
        require_learning_gate(moe, self.normalize_weights)

    def build(self, config: GPTConfig, layer_index: int) -> Router:
        """See `RouterConfig`."""
        assert config.moe is not None
        experts, gate = experts_at(config, layer_index), (self.gate_scale, self.normalize_weights, self.init_std)
        return TopKRouter(config.moe, config.hidden_size, experts, layer_index, *gate)


def require_learning_gate(moe: MoEConfig, normalize_weights: bool | None) -> None:
    """Refuse one normalised weight, which is constant: the gate would get no gradient from the loss."""
    require(
        not (normalize_weights and moe.top_k == 1),
        "normalize_weights=True with top_k=1 makes every weight the same, and the gate learns nothing; leave it out",
    )
