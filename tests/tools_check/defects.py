"""Defects of a MoE layer, of the kinds that other code bases had, and the layer that has one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from nlgmoe import GPTConfig, MoEConfig, MoELayer, Router, Routing, RoutingContext
from nlgmoe.layers import dispatch
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.router import TopKRouter
from nlgmoe.seeding import RoutingNoise
from nlgmoe.tools.check.layer import Layer
from nlgmoe.tools.check.own import OwnLayer, own_layer

CAPACITY = MoEConfig(8, loss_coeff=0.01)
TWO = MoEConfig(8, top_k=2, second_expert="argmax")
DROPLESS = replace(TWO, token_dropping=False)


@dataclass(frozen=True)
class Broken(OwnLayer):
    spoil: Callable[[MoELayer], None] | None = None

    def build(self) -> nn.Module:
        module = super().build()
        self.spoil(module)
        return module

    def build_on_rank(self, whole: nn.Module) -> nn.Module:
        module = super().build_on_rank(whole)
        self.spoil(module)
        return module

    def odd(self) -> Layer:
        return Broken(**vars(super().odd()), spoil=self.spoil)

    def on_ranks(self) -> OwnLayer:
        return Broken(**vars(super().on_ranks()), spoil=self.spoil)


def clean(moe: MoEConfig) -> OwnLayer:
    return own_layer(GPTConfig(61, moe=moe), "ours")


def broken(moe: MoEConfig, spoil: Callable[[MoELayer], None]) -> Broken:
    return Broken(**vars(clean(moe)), spoil=spoil)


def router(**methods: Any) -> Callable[[MoELayer], None]:
    """Replace methods of the router."""

    def spoil(module: MoELayer) -> None:
        module.router.__class__ = type("BrokenRouter", (type(module.router),), methods)

    return spoil


def routed(change: Callable[[Routing, Tensor], Routing]) -> Callable[[MoELayer], None]:
    """Change what the router returns; `change` also gets its input."""

    def forward(self: TopKRouter, x: Tensor, context: RoutingContext) -> Routing:
        return change(TopKRouter.forward(self, x, context), x)

    return router(forward=forward)


def layer(change: Callable[[MoELayer, Tensor, Tensor, Routing], Tensor]) -> Callable[[MoELayer], None]:
    """Change the output, `change(layer, x, y, routing)`."""

    def forward(self: MoELayer, x: Tensor, context: RoutingContext) -> tuple[Tensor, Routing]:
        y, routing = MoELayer.forward(self, x, context)
        return change(self, x, y, routing), routing

    def spoil(module: MoELayer) -> None:
        module.__class__ = type("BrokenLayer", (MoELayer,), {"forward": forward})

    return spoil


def experts(forward: Callable[..., Tensor]) -> Callable[[MoELayer], None]:
    def spoil(module: MoELayer) -> None:
        module.experts.__class__ = type("BrokenExperts", (Experts,), {"forward": forward})

    return spoil


def outputs_of_other_slots(module: MoELayer) -> None:
    """Let each row of a rank take the output of another one's slot."""
    assign = dispatch.assign_slots

    def rolled(*args: Any) -> tuple[Tensor, Tensor]:
        row_of_slot, slot_of_row = assign(*args)
        return row_of_slot, slot_of_row.roll(1)

    if distributed.is_initialized():
        dispatch.assign_slots = rolled


# ---- routers


def capacity_of_training(self: TopKRouter, num_tokens: int) -> int | None:
    training, self.training = self.training, True
    try:
        return TopKRouter._capacity(self, num_tokens)
    finally:
        self.training = training


def one_more(self: TopKRouter, num_tokens: int) -> int | None:
    capacity = TopKRouter._capacity(self, num_tokens)
    return None if capacity is None else capacity + 1


def padding_in_the_queue(
    self: TopKRouter, capacity: int | None, expert: Tensor, probs: Tensor, mask: Tensor | None, draw: RoutingNoise
) -> Tensor:
    kept = TopKRouter._within_capacity(self, capacity, expert, probs, None, draw)
    return kept if mask is None else kept & mask.unsqueeze(-1)


def padding_kept(
    self: TopKRouter, capacity: int | None, expert: Tensor, probs: Tensor, mask: Tensor | None, draw: RoutingNoise
) -> Tensor:
    return TopKRouter._within_capacity(self, capacity, expert, probs, None, draw)


def first_tokens_stay(self: TopKRouter, *args: Any) -> Tensor:
    training, self.training = self.training, False
    try:
        return TopKRouter._within_capacity(self, *args)
    finally:
        self.training = training


def token_by_token(
    self: TopKRouter, capacity: int | None, expert: Tensor, probs: Tensor, mask: Tensor | None, draw: RoutingNoise
) -> Tensor:
    wanted = nn.functional.one_hot(expert.flatten(), self.num_experts)
    place = ((wanted.cumsum(0) - 1) * wanted).sum(1).view_as(expert)
    return place < (capacity or len(expert))


def normalised_before_dropping(self: TopKRouter, x: Tensor, context: RoutingContext) -> Routing:
    routing = TopKRouter.forward(self, x, context)
    weight = routing.probs.gather(1, routing.expert)
    weight = weight / weight.sum(dim=1, keepdim=True)
    return replace(routing, weight=torch.where(routing.kept, weight, 0))


def without_last_expert(self: TopKRouter, x: Tensor) -> Tensor:
    return TopKRouter._logits(self, x) - 1e4 * torch.eye(self.num_experts, dtype=x.dtype, device=x.device)[-1]


def bias_from_forward(self: TopKRouter, x: Tensor, context: RoutingContext) -> Routing:
    routing = TopKRouter.forward(self, x, context)
    if self.training:
        self.load += routing.tokens_per_expert
    return routing


def add_load(module: MoELayer) -> None:
    Router.register_buffer(module.router, "load", torch.zeros(8))
    router(forward=bias_from_forward)(module)


def add_lost_state(module: MoELayer) -> None:
    """A bias that balances, in a tensor that is no buffer."""
    module.router.bias = torch.zeros(8)

    def after_step(self: Any, requests: Tensor) -> None:
        self.bias = self.bias + 0.05 * (requests.float().mean() - requests).sign()

    router(after_step=after_step, _logits=lambda self, x: TopKRouter._logits(self, x) + self.bias.to(x))(module)


def of_a_pool(always: bool) -> Callable[[MoELayer], None]:
    """Let a sequence choose among the four experts that it likes best as a whole (EMO), or do so in training."""

    def forward(self: TopKRouter, x: Tensor, context: RoutingContext) -> Routing:
        self.sequences = len(context.tokens)
        return TopKRouter.forward(self, x, context)

    def logits(self: TopKRouter, x: Tensor) -> Tensor:
        each = TopKRouter._logits(self, x).unflatten(0, (self.sequences, -1))  # [B, T, E]
        liked = each.softmax(-1).mean(dim=1, keepdim=True).topk(4).indices
        pooled = torch.full_like(each[:, :1], -1e4).scatter(2, liked, 0) + each
        return (pooled if always or self.training else each).flatten(0, 1)

    return router(forward=forward, _logits=logits)


def half_gate(self: TopKRouter, x: Tensor) -> Tensor:
    return nn.functional.linear(x.bfloat16(), self.weight.bfloat16()).to(x.dtype)


def read_on_host(routing: Routing, x: Tensor) -> Routing:
    assert routing.tokens_per_expert.max().item() >= 0
    return routing


def counted_in_bf16(
    self: TopKRouter, capacity: int | None, expert: Tensor, probs: Tensor, mask: Tensor | None, draw: RoutingNoise
) -> Tensor:
    valid = torch.ones(len(expert), dtype=torch.bool) if mask is None else mask
    wanted = nn.functional.one_hot(expert.t(), self.num_experts) * valid.view(1, -1, 1)  # [k, N, E]
    place = ((wanted.flatten(0, 1).bfloat16().cumsum(0) - 1).view_as(wanted) * wanted).sum(2).t()
    return (place < (capacity or len(expert))) & valid.unsqueeze(-1)


def other_experts_in_evaluation(self: TopKRouter, x: Tensor) -> Tensor:
    logits = TopKRouter._logits(self, x)
    return logits if self.training else logits.roll(1, -1)


def after_step(load: Callable[[TopKRouter, Tensor], Tensor]) -> Callable[[MoELayer], None]:
    """Keep a load, `load(router, requests)`, in a buffer after each step."""

    def forward(self: TopKRouter, x: Tensor, context: RoutingContext) -> Routing:
        routing = TopKRouter.forward(self, x, context)
        self.seen = routing.tokens_per_expert
        return routing

    def step(self: TopKRouter, requests: Tensor) -> None:
        self.load.copy_(load(self, requests))

    def spoil(module: MoELayer) -> None:
        Router.register_buffer(module.router, "load", torch.zeros(8))
        router(forward=forward, after_step=step)(module)

    return spoil


def clipped(self: TopKRouter, requests: Tensor) -> Tensor:
    return requests / requests.sum().clamp(min=1) if requests.max() > 0 else requests


def own_loss(loss: Callable[[Tensor], Tensor]) -> Callable[[MoELayer], None]:
    """Add a loss of the router's own, `loss(log_z)`, `[N] -> []`."""
    return routed(lambda routing, x: replace(routing, losses={"own_z_loss": loss(routing.logits.logsumexp(-1))}))


# ---- experts and the layer


def without_gradients_of_expert_0(self: Experts, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
    y = Experts.forward(self, x, tokens_per_expert)
    first = (torch.arange(len(y)) < tokens_per_expert[0]).unsqueeze(-1)
    return torch.where(first, y.detach(), y)


def lost_expert(self: Experts, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """The last expert's tokens go to the one before it."""
    merged = tokens_per_expert.clone()
    merged[-2] += merged[-1]
    merged[-1] = 0
    return Experts.forward(self, x, merged)


def copy_dropped(self: MoELayer, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
    return torch.where(routing.kept.any(1).view(*x.shape[:2], 1), y, x)


def batch_normalised(self: MoELayer, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
    return y - y.mean(dim=(0, 1)) if self.training else y


def shifted(self: MoELayer, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
    return y + 1e-2 * x.roll(1, 1)


def even_widths(self: MoELayer, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
    return y.view(*y.shape[:2], -1, 2).flatten(2)


class TimesRanks(torch.autograd.Function):
    """A gradient times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (distributed.get_world_size() if distributed.is_initialized() else 1)


def gate_of_ranks(module: MoELayer) -> None:
    """Sum the gate's gradient over ranks instead of averaging it (transformers#48687)."""
    router(_logits=lambda self, x: TimesRanks.apply(TopKRouter._logits(self, x)))(module)
