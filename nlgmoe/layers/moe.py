"""MoELayer = router + dispatch + experts, and the shared MLP of Residual-MoE (paper, sections 3.1 and 4.1.1).

    experts(x) = sum_i weight_i * expert_i(x)      over the chosen experts i that kept the token; 0 if none did

    standard:          y = experts(x)
    residual, sum:     y = experts(x) + MLP(x)
    residual, learned: y = c_0 * experts(x) + c_1 * MLP(x)       c = softmax(W x + b), in at least fp32; b = 0 at first

Letters: B sequences, T positions, N = B * T tokens, H hidden size, k experts per token.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe.config import GPTConfig
from nlgmoe.layers.all_to_all import AllToAllDispatcher
from nlgmoe.layers.contract import build_router, require_routing
from nlgmoe.layers.dispatch import LocalDispatcher
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.feed_forward import FeedForward, expert_network
from nlgmoe.layers.placement import ExpertPlacement
from nlgmoe.layers.router import Router, Routing, RoutingContext, TopKRouter, fp32_products, without_autocast
from nlgmoe.pyramid import experts_at


class MoELayer(nn.Module):
    """A feed-forward layer made of experts.

    Args:
        config: the model's configuration; `config.moe` must be set.
        layer_index: block number, counted from 0; `pyramid.experts_at` gives its number of experts.
        placement: the experts that this rank holds; None: all.
    """

    def __init__(self, config: GPTConfig, layer_index: int, placement: ExpertPlacement | None = None) -> None:
        super().__init__()
        num_experts = experts_at(config, layer_index)
        assert config.moe is not None and num_experts > 0, f"block {layer_index} is not MoE"
        self.top_k = config.moe.top_k
        if config.moe.router is None:
            self.router: Router = TopKRouter(config.moe, config.hidden_size, num_experts, layer_index)
        else:
            self.router = build_router(config, layer_index, num_experts)
        self.placement = placement if placement is not None else ExpertPlacement(first=0, count=num_experts)
        is_sharded = self.placement.group is not None
        self.dispatcher = AllToAllDispatcher(self.placement) if is_sharded else LocalDispatcher()
        self.experts = Experts(
            self.placement.count,
            config.hidden_size,
            config.expert_ffn_size,
            self.placement.first,
            expert_network(config),
            config.bias,
        )
        residual = config.moe.mlp_type == "residual"
        self.mlp = FeedForward(config, config.shared_ffn_size) if residual else None
        learned_mix = residual and config.moe.residual_mix == "learned"
        self.coefficient = nn.Linear(config.hidden_size, 2) if learned_mix else None

    def forward(self, x: Tensor, context: RoutingContext = RoutingContext()) -> tuple[Tensor, Routing]:  # noqa: B008 (frozen)
        """Apply the layer.

        Args:
            x: `[B, T, H]`.
            context: other inputs of the router.

        Returns:
            `y` `[B, T, H]` in the dtype of `x`, and the routing.

        Raises:
            ValueError: the router did not return a `Routing` of the required shapes and types.
        """
        tokens = x.flatten(0, 1)  # [N, H]
        routing = require_routing(self.router(tokens, context), self.router, len(tokens), self.top_k)
        dispatch = self.dispatcher(tokens, routing)
        # overlaps with the all-to-all under expert parallelism
        mlp = self.mlp(tokens) if self.mlp is not None else None
        y = dispatch.combine(self.experts(*dispatch.receive()))  # [N, H], in at least fp32
        if self.coefficient is not None:
            assert mlp is not None
            y, share = self._mix(tokens, y, mlp)
            routing = replace(routing, expert_share=share.detach())
        elif mlp is not None:
            y = y + mlp
        return y.to(x.dtype).view_as(x), routing

    def _mix(self, x: Tensor, expert: Tensor, mlp: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the experts and the shared MLP. Returns `[N, H]` in the dtype of `expert`, and the experts' weight, `[N]`."""
        assert self.coefficient is not None
        with without_autocast(x.device.type):
            dtype = expert.dtype
            with fp32_products():
                logits = F.linear(x.to(dtype), self.coefficient.weight.to(dtype), self.coefficient.bias.to(dtype))
            share = F.softmax(logits, dim=-1)  # [N, 2]
            return expert * share[:, 0:1] + mlp * share[:, 1:2], share[:, 0]


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Return the MoE layers of a model, from the first to the last."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]
