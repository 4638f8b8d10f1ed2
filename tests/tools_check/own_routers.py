"""Correct routers of a user's own, with idioms that raise no alarm, and twins with one defect each."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe import GPTConfig, MoEConfig, Router, RouterConfig, Routing, RoutingContext, experts_at


@dataclass(frozen=True)
class OwnCapacityConfig(RouterConfig):
    """A linear gate with bias and learned temperature; an expert keeps its likeliest tokens, `room` times its fair share.

    Attributes:
        room: capacity of an expert in training, over k * tokens / experts.
        defect: `capacity`: an expert keeps one token more than it says; `sum`: weights are not renormalised after dropping.
    """

    reads_fields = frozenset({"loss_coeff", "aux_scope"})
    room: float = 1.2
    defect: str = ""

    def build(self, config: GPTConfig, block: int) -> Router:
        assert config.moe is not None
        return OwnCapacity(self, config.moe, config.hidden_size, experts_at(config, block))

    def capacity(self, moe: MoEConfig, tokens: int, experts: int) -> int:
        return math.ceil(self.room * moe.top_k * tokens / experts)


@dataclass(frozen=True)
class DeclaredCapacityConfig(OwnCapacityConfig):
    """The same with the capacity of `MoEConfig`, which it declares to read: `nlgmoe check` knows its capacity."""

    reads_fields = OwnCapacityConfig.reads_fields | {"token_dropping", "train_capacity_factor", "min_capacity"}

    def capacity(self, moe: MoEConfig, tokens: int, experts: int) -> int:
        fair = math.ceil(moe.train_capacity_factor * moe.top_k * tokens / experts)
        return max(moe.min_capacity, fair + (self.defect == "formula")) if moe.token_dropping else tokens


class OwnCapacity(Router):
    roles: ClassVar = {"weight": "weight", "bias": "bias", "temperature": "scale"}

    def __init__(self, settings: OwnCapacityConfig, moe: MoEConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.settings, self.moe = settings, moe
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_experts))
        self.temperature = nn.Parameter(torch.ones(1))  # DeepSpeed takes no parameter without dimension
        self.weight_sum = 1.0 if moe.top_k > 1 else None

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))  # [N, E]
            logits = logits / self.temperature.to(dtype)
            probs = logits.softmax(dim=-1)
        weight, expert = probs.topk(self.moe.top_k, dim=-1)  # [N, k]
        mask = None if context.mask is None else context.mask.flatten()
        kept = torch.ones_like(expert, dtype=torch.bool) if mask is None else mask.unsqueeze(-1).expand_as(expert)
        capacity = self.settings.capacity(self.moe, len(x), self.num_experts) if self.training else len(x)
        queue = weight.detach().masked_fill(~kept, -1).flatten().argsort(descending=True, stable=True)  # [N * k]
        wanted = F.one_hot(expert.flatten()[queue], self.num_experts)
        place = torch.empty_like(queue).scatter_(0, queue, ((wanted.cumsum(0) - 1) * wanted).sum(1))
        kept = kept & (place.view_as(kept) < capacity + (self.settings.defect == "capacity"))
        if self.settings.defect != "sum":
            weight = weight.masked_fill(~kept, 0)
        if self.weight_sum:
            weight = weight / weight.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).eps)
        weight = weight.masked_fill(~kept, 0)
        return Routing(expert, weight, kept, self.num_experts, mask, logits, probs, capacity=capacity)
