"""A correct router of a user's own, with idioms that raise no alarm."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe import GPTConfig, MoEConfig, Router, RouterConfig, Routing, RoutingContext, experts_at


@dataclass(frozen=True)
class OwnCapacityConfig(RouterConfig):
    """A linear gate with bias and learned temperature; an expert keeps its likeliest tokens, 1.2 times its fair share."""

    reads_fields = frozenset({"loss_coeff", "aux_scope"})

    def build(self, config: GPTConfig, block: int) -> Router:
        assert config.moe is not None
        return OwnCapacity(config.moe, config.hidden_size, experts_at(config, block))


class OwnCapacity(Router):
    roles: ClassVar = {"weight": "weight", "bias": "bias", "temperature": "scale"}
    weight_sum = 1.0

    def __init__(self, moe: MoEConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.top_k = moe.top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_experts))
        self.temperature = nn.Parameter(torch.ones(1))  # DeepSpeed takes no parameter without dimension

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))  # [N, E]
            logits = logits / self.temperature.to(dtype)
            probs = logits.softmax(dim=-1)
        weight, expert = probs.topk(self.top_k, dim=-1)  # [N, k]
        mask = None if context.mask is None else context.mask.flatten()
        kept = torch.ones_like(expert, dtype=torch.bool) if mask is None else mask.unsqueeze(-1).expand_as(expert)
        fair = self.top_k * len(x) / self.num_experts
        capacity = math.ceil(1.2 * fair) if self.training else len(x)
        queue = weight.detach().masked_fill(~kept, -1).flatten().argsort(descending=True, stable=True)  # [N * k]
        wanted = F.one_hot(expert.flatten()[queue], self.num_experts)
        place = torch.empty_like(queue).scatter_(0, queue, ((wanted.cumsum(0) - 1) * wanted).sum(1))
        kept = kept & (place.view_as(kept) < capacity)
        weight = weight.masked_fill(~kept, 0)
        weight = weight / weight.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).eps)
        return Routing(expert, weight, kept, self.num_experts, mask, logits, probs, capacity=capacity)
