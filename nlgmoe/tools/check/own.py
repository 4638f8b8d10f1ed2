"""A MoE layer of this project, from a configuration, at small widths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.balance import add_router_losses, router_losses
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.router import Router, Routing, RoutingContext, TopKRouter
from nlgmoe.pyramid import ExpertPlacement, experts_per_layer
from nlgmoe.tools.check.layer import Batch, Layer, Output
from nlgmoe.validation import SettingError

MOST_EXPERTS = 8  # of a layer under test, unless `top_k` is larger
RANKED_EXPERTS = 6  # which 2 and 3 ranks divide; with groups a multiple


@dataclass(frozen=True)
class OwnLayer(Layer):
    """The layer of a configuration.

    Attributes:
        config: of one MoE block, number 0.
    """

    config: GPTConfig = GPTConfig(1)  # noqa: RUF009 (frozen)

    @property
    def moe(self) -> MoEConfig:
        """Return the settings of the layer."""
        assert self.config.moe is not None
        return self.config.moe

    def build(self) -> nn.Module:
        """See `Layer`."""
        return MoELayer(self.config, 0)

    def forward(self, module: nn.Module, batch: Batch) -> Output:
        """See `Layer`."""
        y, routing = module(batch.x, self._context(batch))
        return self._output(y, routing)

    def without_dispatch(self, module: nn.Module, batch: Batch) -> Output:
        """See `Layer`: runs router and expert network, and none of `LocalDispatcher`, which reads counts on a CPU."""
        x = batch.x.flatten(0, 1)
        routing = module.router(x, self._context(batch))  # type: ignore[operator]
        return self._output(self.weighted_sum(module, x, routing), routing)

    def _context(self, batch: Batch) -> RoutingContext:
        counted = torch.ones_like(batch.tokens) if batch.mask is None else batch.mask.long()
        positions = (counted.cumsum(1) - 1).clamp_min(0) + batch.first_position
        return RoutingContext(batch.tokens % self.config.vocab_size, batch.mask, batch.noise_key, positions)

    def _output(self, y: Tensor, routing: Routing) -> Output:
        aux, _ = add_router_losses(y.new_zeros((), dtype=routing.weight.dtype), self.moe, [routing])
        other = self.moe.z_loss_coeff * router_losses([routing])[1]
        if self._reads("loss_coeff") and self.moe.loss_coeff and routing.probs is not None:
            other = other + sum(routing.losses.values())  # the router's own losses need not balance
        return Output(y, routing, aux, other)

    def capacity(self, tokens: int) -> int:
        """See `Layer`; the formula of the paper's code, in fp32."""
        share = np.float32(tokens / self.num_experts) * np.float32(self.moe.train_capacity_factor * self.top_k)
        return max(self.moe.min_capacity, math.ceil(share))

    def gate_weight(self, module: nn.Module) -> Tensor | None:
        """See `Layer`; None also for a weight of that shape whose product with the input does not give the logits.

        A gate that normalises its input, such as a cosine, or one of two factors, computes logits that no batch can set.
        """
        shape, router = (self.num_experts, self.hidden_size), module.router
        tensors: list[Tensor] = [*router.parameters(), *router.buffers()]  # type: ignore[union-attr]
        weight = next((tensor for tensor in tensors if tuple(tensor.shape) == shape), None)
        if weight is None:
            return None
        zero = torch.zeros(1, len(weight), dtype=torch.long)
        context = RoutingContext(zero, noise_key=(0, 0, 0), positions=zero)
        with torch.no_grad():
            one, two = (router(scale * weight, context).logits for scale in (1, 2))  # type: ignore[operator]  # [E, E]
            if one is None:
                return weight
            pair = torch.stack([one.flatten(), (weight @ weight.t()).flatten()])  # [2, E * E]
        linear = len(weight) == 1 or torch.corrcoef(pair)[0, 1] > 0.5
        return weight if linear and not torch.allclose(one, two, rtol=0.05) else None

    def gate_bias(self, module: nn.Module) -> Tensor | None:
        """See `Layer`: the logits of a token of zeros."""
        zero = torch.zeros(1, 1, dtype=torch.long)
        x = torch.zeros(1, self.hidden_size, dtype=next(module.parameters()).dtype)
        with torch.no_grad():
            logits = module.router(x, RoutingContext(zero, noise_key=(0, 0, 0), positions=zero)).logits  # type: ignore[operator]
        return None if logits is None else logits[0]

    def gate(self, module: nn.Module) -> list[nn.Parameter]:
        """See `Layer`."""
        return [value for value in module.router.parameters() if value.requires_grad]  # type: ignore[union-attr]

    def expert(self, module: nn.Module, index: int, x: Tensor) -> Tensor | None:
        """See `Layer`."""
        assert isinstance(module, MoELayer)
        values = dict(module.experts.named_parameters())

        def linear(name: str, rows: Tensor) -> Tensor:
            y = rows @ values[f"{name}_weight"][index]
            return y + values[f"{name}_bias"][index] if module.experts.bias else y

        return module.experts.network.forward(x, linear)

    def join(self, module: nn.Module, x: Tensor, experts: Tensor) -> Tensor:
        """See `Layer`."""
        assert isinstance(module, MoELayer)
        if module.mlp is None:
            return experts
        if module.coefficient is None:
            return experts + module.mlp(x)
        logits = module.coefficient(x)
        if self.moe.residual_mix == "sigmoid":
            return experts + module.mlp(x) * logits.sigmoid()
        share = F.softmax(logits, dim=-1)
        return experts * share[:, :1] + module.mlp(x) * share[:, 1:]

    def after_step(self, module: nn.Module, routings: Sequence[Routing]) -> bool:
        """See `Layer`."""
        router = module.router
        assert isinstance(router, Router)
        router.after_step(torch.stack([routing.tokens_per_expert for routing in routings]).sum(0))
        return router.learns_from_steps

    def odd(self) -> Layer:
        """See `Layer`."""
        return own_layer(replace(self.config, hidden_size=15, ffn_hidden_size=13), self.name, width=15)

    def on_ranks(self) -> OwnLayer:
        """Return the layer with experts that 2 and 3 ranks divide, without noise where they have to equal the whole batch."""
        multiple = math.lcm(RANKED_EXPERTS, _groups(self.moe)[0])
        experts = multiple * -(-_fewest_experts(self.moe) // multiple)
        quiet = {} if self.drops else {"noise": None, "second_expert": "argmax"}
        quiet = {name: value for name, value in quiet.items() if self._reads(name)}
        scope = {"aux_scope": "rank"} if self.accumulates and self._reads("aux_scope") else {}
        moe = replace(self.moe, num_experts=experts, **quiet, **scope)  # type: ignore[arg-type]
        return own_layer(replace(self.config, moe=moe), self.name, most=experts)

    @property
    def accumulates(self) -> bool:
        """Return True if ranks equal one process that accumulates their micro-batches, not one with the whole batch."""
        return bool(self.drops) or self.moe.router is not None or self.moe.aux_scope == "rank"

    def build_on_rank(self, whole: nn.Module) -> nn.Module:
        """Make this rank's share of `whole`, with its weights. A collective."""
        count = self.num_experts // distributed.get_world_size()
        first = distributed.get_rank() * count
        share = MoELayer(self.config, 0, ExpertPlacement(first, count, distributed.group.WORLD))
        share.dispatcher.equal_batches = True  # as in training on `PileDataModule`
        values = whole.state_dict()
        for name in values:
            if name.startswith("experts."):
                values[name] = values[name][first : first + count]
        share.to(next(whole.parameters()).dtype).load_state_dict(values)
        return share.train(whole.training)

    def _reads(self, field: str) -> bool:
        return _reads(self.moe, field)


def _reads(moe: MoEConfig, *fields: str) -> bool:
    """Return True if the router reads the settings."""
    return moe.router is None or moe.router.reads_fields.issuperset(fields)


def _groups(moe: MoEConfig) -> tuple[int, int]:
    """Return the number of groups, and of those that a token chooses from."""
    return (moe.groups[0], moe.groups[1]) if moe.groups is not None else (1, 1)


def _fewest_experts(moe: MoEConfig) -> int:
    """Return the smallest number of experts among which a token can choose, two in each group."""
    number, chosen = _groups(moe)
    return number * max(2, -(-moe.top_k // chosen))


def own_layer(config: GPTConfig, name: str, width: int = 16, most: int = MOST_EXPERTS) -> OwnLayer:
    """Return the MoE layer of a configuration, at small widths.

    It has at most 8 experts, or twice `top_k`, or the next number that the groups divide, with two experts a group.
    """
    if config.moe is None or not any(experts_per_layer(config)):
        raise SettingError(f"{name} has no MoE layer; set model.config.moe")
    top_k, (number, _) = config.moe.top_k, _groups(config.moe)
    divided = number * -(-max(most, 2 * top_k) // number)
    experts = min(max(experts_per_layer(config)), max(divided, _fewest_experts(config.moe)))
    inner = 13 if width % 2 else 16
    shared = inner if config.moe.mlp_type == "residual" else None
    moe = replace(config.moe, num_experts=experts, expert_interval=1, expert_ffn_size=inner, shared_ffn_size=shared)
    small = replace(
        config, seq_len=64, num_layers=1, hidden_size=width, num_heads=1, num_kv_heads=None, head_dim=None, attention=None,
        rope_theta=None, rotary_dim=None, rotary_scaling=None,
        ffn_hidden_size=inner, hidden_dropout=0.0, attention_dropout=0.0, moe=moe,
    )  # fmt: skip
    router = MoELayer(small, 0).router
    order, drops = None, None
    if isinstance(router, TopKRouter) and type(router)._within_capacity is TopKRouter._within_capacity:
        order = {1: "random" if moe.random_token_selection else "position", 2: "position"}.get(top_k, "score")
    if _reads(moe, "token_dropping") and not moe.token_dropping:
        drops = False
    elif _reads(moe, "token_dropping", "train_capacity_factor", "min_capacity"):
        drops = True  # the router reads what `capacity` is computed from; else its capacity, if any, is its own
    return OwnLayer(
        name=name,
        hidden_size=width,
        num_experts=experts,
        top_k=top_k,
        weight_sum=router.weight_sum or ("free" if isinstance(router, TopKRouter) else None),
        order=order,  # type: ignore[arg-type]
        takes_mask=True,
        takes_key=True,
        drops=drops,
        drops_in_evaluation=moe.eval_token_dropping,
        estimated_gradient=router.estimated_gradient,
        config=small,
    )
