"""A router of a user's own that extends the paper's and learns from steps, as loss-free balancing does (arXiv 2408.15664)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nlgmoe import GPTConfig, RouterConfig, experts_at
from nlgmoe.config import ROUTER_FIELDS
from nlgmoe.layers.router import TopKRouter


@dataclass(frozen=True)
class BiasRouterConfig(RouterConfig):
    """Attributes:
    rate: by which the biases change after each step.
    """

    uses = ROUTER_FIELDS
    rate: float = 1e-3

    def build(self, config: GPTConfig, layer_index: int) -> BiasRouter:
        """See `RouterConfig`."""
        return BiasRouter(config, layer_index, self.rate)


class BiasRouter(TopKRouter):
    """Adds a bias to the logits for the choice alone; it falls where an expert was asked for more than its share."""

    def __init__(self, config: GPTConfig, layer_index: int, rate: float) -> None:
        assert config.moe is not None
        super().__init__(config.moe, config.hidden_size, experts_at(config, layer_index), layer_index)
        self.rate = rate
        self.register_buffer("bias", torch.zeros(self.num_experts))

    def _choose(self, logits: Tensor, probs: Tensor, draw: Any) -> Tensor:
        return super()._choose(logits + self.bias, probs, draw)

    def after_step(self, requests: Tensor) -> None:
        """See `Router`."""
        self.bias += self.rate * (requests.float().mean() - requests).sign()
