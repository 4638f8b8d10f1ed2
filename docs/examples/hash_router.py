"""A router without parameters: each token id has an expert of its own, drawn once (Hash Layers, arXiv 2106.04426)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nlgmoe import GPTConfig, Router, RouterConfig, Routing, RoutingContext, experts_at


@dataclass(frozen=True)
class HashRouterConfig(RouterConfig):
    """Settings of a hash router.

    Attributes:
        seed: of the table from token ids to experts.
    """

    seed: int = 0

    def build(self, config: GPTConfig, layer_index: int) -> Router:
        """See `RouterConfig`."""
        return HashRouter(config.vocab_size, experts_at(config, layer_index), self.seed + layer_index)


class HashRouter(Router):
    """Looks the expert of a token up; every assignment is kept, with weight 1."""

    def __init__(self, vocab_size: int, num_experts: int, seed: int) -> None:
        super().__init__(num_experts)
        generator = torch.Generator("cpu").manual_seed(seed)
        table = torch.randint(num_experts, (vocab_size,), generator=generator, device="cpu")
        self.register_buffer("table", table)  # [V], an entry of the checkpoint

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """See `Router`."""
        expert = self.table[context.tokens].view(-1, 1)  # [N, 1]
        weight = torch.ones_like(expert, dtype=torch.promote_types(x.dtype, torch.float32))
        return Routing(expert, weight, torch.ones_like(expert, dtype=torch.bool), self.num_experts)
