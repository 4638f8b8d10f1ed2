"""MoELayer = router + dispatch + experts, and the shared expert of Residual-MoE (paper, sections 3.1 and 4.1.1).

    experts(x) = sum_i weight_i * expert_i(x)      over the chosen experts i that kept the token; 0 if none did

    standard:          y = experts(x)
    residual, sum:     y = experts(x) + shared(x)
    residual, learned: y = c_0 * experts(x) + c_1 * shared(x)    c = softmax(W x + b), in at least fp32; b = 0 at first
    residual, sigmoid: y = experts(x) + g * shared(x)            g = sigmoid(w x), in at least fp32 (Qwen2-MoE)

Letters: B sequences, T positions, N = B * T tokens, H hidden size, k experts per token.
"""

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe.config import GPTConfig
from nlgmoe.layers.all_to_all import AllToAllDispatcher
from nlgmoe.layers.dispatch import LocalDispatcher
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.feed_forward import FeedForward, expert_network
from nlgmoe.layers.precision import fp32_products, without_autocast
from nlgmoe.layers.router import build_router
from nlgmoe.layers.routing import Routing, RoutingContext
from nlgmoe.pyramid import ExpertPlacement, experts_at
from nlgmoe.validation import RunError


class LinearInInputType(nn.Linear):
    """A linear layer that casts its weights to the type of its input. It is called, so that an adapter can take its place."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, `[..., in] -> [..., out]`."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class MoELayer(nn.Module):
    """A feed-forward layer made of experts.

    Args:
        block: block number, counted from 0; `pyramid.experts_at` gives its number of experts.
        placement: the experts that this rank holds; None: all.
    """

    def __init__(self, config: GPTConfig, block: int, placement: ExpertPlacement | None = None) -> None:
        super().__init__()
        num_experts = experts_at(config, block)
        assert config.moe is not None and num_experts > 0, f"block {block} is not MoE"
        self.top_k = config.moe.top_k
        self.router = build_router(config, block)
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
        self.shared_expert = FeedForward(config, config.shared_ffn_size) if config.moe.mlp_type == "residual" else None
        outputs = config.moe.mix_outputs
        self.coefficient = LinearInInputType(config.hidden_size, outputs, bias=outputs == 2) if outputs else None

    def forward(self, x: Tensor, context: RoutingContext = RoutingContext()) -> tuple[Tensor, Routing]:  # noqa: B008 (frozen)
        """Apply the layer to `x` `[B, T, H]`. Returns `y` `[B, T, H]` in the dtype of `x`, and the routing."""
        tokens = x.flatten(0, 1)  # [N, H]
        routing = self._require_fit(self.router(tokens, context), len(tokens))
        dispatch = self.dispatcher(tokens, routing)
        # overlaps with the all-to-all under expert parallelism
        shared = self.shared_expert(tokens) if self.shared_expert is not None else None
        y = dispatch.combine(self.experts(*dispatch.receive()))  # [N, H], in at least fp32
        if self.coefficient is not None:
            assert shared is not None
            y, share = self._mix(tokens, y, shared)
            routing = replace(routing, expert_share=share)
        elif shared is not None:
            y = y + shared
        return y.to(x.dtype).view_as(x), routing

    def _require_fit(self, routing: Routing, num_tokens: int) -> Routing:
        name, shape, num_experts = type(self.router).__name__, (num_tokens, self.top_k), self.router.num_experts
        if routing.expert.shape != shape:
            raise RunError(
                f"{name} returned expert of {list(routing.expert.shape)}, not [tokens, top_k] = {list(shape)}; set "
                "model.config.moe.top_k to the number of experts that it chooses"
            )
        if routing.num_experts != num_experts:
            raise RunError(f"{name} returned num_experts={routing.num_experts} in a layer of {num_experts} experts")
        # Not in `Routing`: `nlgmoe check` reports weights in half precision as a property that fails.
        if routing.weight.dtype.itemsize < 4:
            raise RunError(f"{name} returned weights of {routing.weight.dtype}; compute them in fp32")
        return routing

    def _mix(self, x: Tensor, expert: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the routed experts and the shared expert. Returns `[N, H]` in the dtype of `expert`, and `Routing.expert_share`."""
        assert self.coefficient is not None
        with without_autocast(x.device.type):
            with fp32_products():
                logits = self.coefficient(x.to(expert.dtype))
            if logits.shape[1] == 1:
                gate = logits.sigmoid()  # [N, 1]
                return expert + shared * gate, 1 / (1 + gate.detach()[:, 0])
            share = F.softmax(logits, dim=-1)  # [N, 2]
            return expert * share[:, 0:1] + shared * share[:, 1:2], share[:, 0].detach()


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Return the MoE layers of a model, from the first to the last."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]
