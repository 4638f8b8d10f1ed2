"""A router without parameters: each token id has an expert of its own, drawn once (Hash Layers, arXiv 2106.04426)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nlgmoe import GPTConfig, Router, RouterConfig, Routing, RoutingContext, experts_at
from nlgmoe.seeding import derive_seed


@dataclass(frozen=True)
class HashRouterConfig(RouterConfig):
    """Settings of a hash router.

    Attributes:
        seed: of the table from token ids to experts.
    """

    seed: int = 0

    def build(self, config: GPTConfig, block: int) -> Router:
        """See `RouterConfig`."""
        seed = derive_seed("hash router", self.seed, block)
        return HashRouter(config.vocab_size, experts_at(config, block), seed)


class HashRouter(Router):
    """Looks up the expert of a token. Every assignment but padding is kept, with weight 1."""

    def __init__(self, vocab_size: int, num_experts: int, seed: int) -> None:
        super().__init__(num_experts)
        generator = torch.Generator("cpu").manual_seed(seed)
        table = torch.randint(num_experts, (vocab_size,), generator=generator, device="cpu")
        self.register_buffer("table", table)  # [V], an entry of the checkpoint

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """See `Router`."""
        assert context.tokens is not None, "a hash router needs token ids"
        expert = self.table[context.tokens].view(-1, 1)  # [N, 1]
        mask = None if context.mask is None else context.mask.flatten()  # [N]
        kept = torch.ones_like(expert, dtype=torch.bool) if mask is None else mask.unsqueeze(-1)  # [N, 1]
        weight = kept.to(torch.promote_types(x.dtype, torch.float32))
        return Routing(expert, weight, kept, self.num_experts, mask)
