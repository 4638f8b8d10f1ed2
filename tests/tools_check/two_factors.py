"""A router with a gate of two factors, the first of which has the shape of a linear gate of 8 experts."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nlgmoe import GPTConfig, Router, RouterConfig, Routing, RoutingContext, experts_at


@dataclass(frozen=True)
class TwoFactorsConfig(RouterConfig):
    uses = frozenset({"loss_coeff", "aux_scope"})
    rank: int = 8

    def build(self, config: GPTConfig, layer_index: int) -> Router:
        assert config.moe is not None
        return TwoFactors(config.hidden_size, experts_at(config, layer_index), config.moe.top_k, self.rank)


class TwoFactors(Router):
    def __init__(self, hidden_size: int, num_experts: int, top_k: int, rank: int) -> None:
        super().__init__(num_experts)
        self.top_k = top_k
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        with torch.autocast(x.device.type, enabled=False):  # in at least fp32
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            logits = x @ self.down.weight.to(x.dtype).t() @ self.up.weight.to(x.dtype).t()  # [N, E]
            probs = logits.softmax(-1)
        weight, expert = probs.topk(self.top_k, -1)
        mask = None if context.mask is None else context.mask.flatten()
        kept = torch.ones_like(expert, dtype=torch.bool) if mask is None else mask.unsqueeze(-1).expand_as(expert)
        return Routing(
            expert, weight.masked_fill(~kept, 0), kept, self.num_experts, mask, logits, probs, all_kept=mask is None
        )
