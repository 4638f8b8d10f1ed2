"""A control: the paper's router with a random gate that does not learn.

    logits = x W        [N, E]   W ~ N(0, gate_init_std), drawn from the seed, a buffer of the checkpoint

Choices and weights still change with the hidden states. "Towards an empirical understanding of MoE design choices" (arXiv
2402.13089) finds it as good as a learned gate. All else as in `layers/router.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nlgmoe.config import GPTConfig
from nlgmoe.layers.router import Router, TopKRouter
from nlgmoe.parts import ROUTER_FIELDS, RouterConfig
from nlgmoe.pyramid import experts_at
from nlgmoe.seeding import derive_seed
from nlgmoe.validation import require_valid


@dataclass(frozen=True)
class FrozenRouterConfig(RouterConfig):
    """Settings of a router with a frozen gate.

    Attributes:
        seed: seed of the gate; layers draw different gates.
    """

    reads_fields = ROUTER_FIELDS
    ignored_in_evaluation = frozenset({"seed"})
    seed: int = 0

    def __post_init__(self) -> None:
        require_valid(self)

    def build(self, config: GPTConfig, block: int) -> Router:
        """See `RouterConfig`."""
        assert config.moe is not None
        router = FrozenRouter(config.moe, config.hidden_size, experts_at(config, block), block)
        if not router.weight.is_meta:
            generator = torch.Generator("cpu").manual_seed(derive_seed("frozen router", self.seed, block))
            draw = torch.randn(router.weight.shape, generator=generator, device="cpu", dtype=torch.float32)
            router.weight.copy_(draw * (config.moe.gate_init_std or config.init_std))
        return router


class FrozenRouter(TopKRouter):
    """The paper's router with its gate in a buffer, which is not optimised."""

    weight: Tensor  # type: ignore[assignment]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        gate = self.weight.detach()
        del self.weight
        self.register_buffer("weight", gate)
