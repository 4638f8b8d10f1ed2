"""A router that learns: top-k by the cosine of hidden state and expert vector (after XMoE, arXiv 2204.09179)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe import GPTConfig, Router, RouterConfig, Routing, RoutingContext, experts_at


@dataclass(frozen=True)
class CosineRouterConfig(RouterConfig):
    """Settings of a cosine router.

    Attributes:
        temperature: that the cosines are divided by.
    """

    reads_fields = frozenset({"loss_coeff", "aux_scope"})  # without an annotation: it is no setting
    temperature: float = 0.1

    def build(self, config: GPTConfig, block: int) -> Router:
        """See `RouterConfig`."""
        assert config.moe is not None
        return CosineRouter(config.hidden_size, experts_at(config, block), config.moe.top_k, self.temperature)


class CosineRouter(Router):
    """Weighs the chosen experts by their probability. Every assignment but padding is kept."""

    roles: ClassVar = {"weight": "weight"}  # initial value and weight decay of the parameter

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, temperature: float) -> None:
        super().__init__(num_experts)
        self.top_k, self.temperature = top_k, temperature
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """See `Router`."""
        with torch.autocast(x.device.type, enabled=False):  # in at least fp32
            dtype = torch.promote_types(x.dtype, torch.float32)
            directions = F.normalize(self.weight.to(dtype), dim=-1)  # [E, H]
            logits = F.linear(F.normalize(x.to(dtype), dim=-1), directions) / self.temperature  # [N, E]
            probs = F.softmax(logits, dim=-1)
        weight, expert = probs.topk(self.top_k, dim=-1)  # [N, k]
        mask = None if context.mask is None else context.mask.flatten()  # [N]
        kept = torch.ones_like(expert, dtype=torch.bool) if mask is None else mask.unsqueeze(-1).expand_as(expert)
        return Routing(expert, weight.masked_fill(~kept, 0), kept, self.num_experts, mask, logits, probs)
