"""ROUTER: chooses the experts of each token, and their weights.

    logits = x W                               [N, E]   in at least fp32
    p      = softmax(logits)                   [N, E]
    expert = the k largest logits              [N, k]   k = 2, training: the second one is sampled (`second_expert`);
                                                        equal ones: the lower expert for k <= 2, unspecified for k > 2;
                                                        with `groups` G, g: of the g groups with the largest maxima
    kept   = the assignments within capacity   [N, k]
    weight = p[expert], where kept             [N, k]   renormalised over the kept ones if k > 1 (`normalize_weights`);
                                                        times `gate_scale`

The load-balancing loss (`balance.py`) counts choices before dropping: the first choices if k <= 2, else all. Follows GShard
(arXiv 2006.16668, algorithm 1), and DeepSpeed's `sharded_moe.py` (0.19.8) at capacity; tests/equivalence compares with the
latter. Other routers: `routers/`.

Letters: N tokens of this rank's micro-batch, E experts, k experts per token, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from ctypes import c_float
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.precision import fp32_products, without_autocast
from nlgmoe.layers.routing import Routing, RoutingContext, count
from nlgmoe.pyramid import experts_at
from nlgmoe.roles import Role
from nlgmoe.seeding import RoutingNoise
from nlgmoe.validation import SettingError, require

JITTER = 1e-2  # half-width of the multiplicative noise, DeepSpeed's default


def capacity(num_tokens: int, num_experts: int, top_k: int, factor: float, minimum: int) -> int:
    """Return the capacity of an expert in assignments: `max(minimum, ceil(k * tokens / experts * factor))`.

    Computed in float32, as DeepSpeed does: 100 tokens, 2 experts and factor 1.1 make 55, not the 56 of float64.
    """
    share, scale = c_float(num_tokens / num_experts).value, c_float(factor * top_k).value
    return max(minimum, math.ceil(min(c_float(share * scale).value, 2.0**31)))  # within int64, at any factor


class Router(nn.Module):
    """Base class of routers; a subclass of `parts.RouterConfig` has its settings and builds it.

    Its buffers are entries of the checkpoint, in fp32 or an integer type at any precision of the run: bf16 would round 1.001
    to 1. They are the same on all ranks and change in `after_step` only: activation checkpointing runs `forward` twice.

    Args:
        num_experts: E of the layer, over all ranks.

    Attributes:
        weight_sum: sum of the weights of a token's kept experts, for `nlgmoe check`; None: not declared.
        estimated_gradient: the gradient of the weights is an estimate, such as straight-through, and not that of their values;
            `nlgmoe check` then compares the gradients of routed experts and shared expert alone with finite differences.
        not_per_expert: names of parameters and buffers that have no row for each expert; `nlgmoe prune` keeps them as they are.
    """

    weight_sum: float | None = None
    left_out: Tensor | None = (
        None  # of `leave_out`: `[E]` bool, on the weight's device; None: every expert may be chosen
    )
    estimated_gradient: bool = False
    not_per_expert: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Route the tokens `x`, `[N, H]` with N = B * T."""
        raise SettingError(f"{type(self).__name__} has no forward(x, context)")

    def after_step(self, statistic: Tensor) -> None:
        """Update the buffers after an optimizer step.

        Args:
            statistic: int64, `Routing.statistic` summed over all ranks and micro-batches of the step; if `forward` gives none,
                `[E]` assignments requested of each expert, before dropping.
        """

    def leave_out(self, experts: Sequence[int]) -> None:
        """Exclude experts from the choice, as if the router had no row for them; an empty list includes all.

        Raises:
            ValueError: the router cannot, or too few experts are left.
        """
        raise SettingError(f"{type(self).__name__} cannot route around experts; use removal=contribution")

    @property
    def learns_from_steps(self) -> bool:
        """True if the class overrides `after_step`."""
        return type(self).after_step is not Router.after_step

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer as in PyTorch, in fp32 if it is of a floating-point type."""
        keeps_dtype = tensor is None or not tensor.is_floating_point()
        super().register_buffer(name, tensor if keeps_dtype else tensor.float(), persistent)  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move the module to another device or dtype; buffers keep their dtype."""
        originals = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, moved in self.named_buffers(recurse=False):
            if moved.dtype != originals[name].dtype:  # from the original, because rounding cannot be undone
                self._buffers[name] = originals[name].to(moved.device)
        return self


class TopKRouter(Router):
    """The paper's router: a linear gate, its top-k experts, and a capacity."""

    roles: ClassVar[dict[str, Role]] = {"weight": "weight"}

    def __init__(self, config: MoEConfig, hidden_size: int, num_experts: int, block: int) -> None:
        super().__init__(num_experts)
        self.config, self.block = config, block
        self.weight_sum = config.gate_scale if config.normalizes else None
        self.init_std = config.gate_init_std  # read by `initialise`
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x: Tensor, context: RoutingContext = RoutingContext()) -> Routing:  # noqa: B008 (frozen)
        """Route `x`, `[N, H]`."""
        config, training = self.config, self.training
        token_mask = None if context.mask is None else context.mask.flatten()  # [N]
        draw = RoutingNoise(context.noise_key, self.block, x.device)
        with without_autocast(x.device.type):  # keeps the product in fp32
            dtype = torch.promote_types(x.dtype, torch.float32)
            gate_input = x.to(dtype)
            if config.noise == "jitter" and training:
                gate_input = gate_input * (1 - JITTER + 2 * JITTER * draw(gate_input.shape))
            logits = self._logits(gate_input)  # [N, E]
            if self.left_out is not None:
                logits = logits.masked_fill(self.left_out, float("-inf"))
            probs = F.softmax(logits, dim=-1)

            expert = self._choose(logits, context, draw)  # [N, k]
            capacity = self._capacity(len(x))
            kept = self._within_capacity(capacity, expert, probs, token_mask, draw)
            drops = capacity is not None or token_mask is not None
            weight = self._weigh(self._scores(logits, probs).gather(1, expert), kept if drops else None)
        return Routing(expert, weight, kept, self.num_experts, token_mask, logits, probs, {}, capacity)

    def leave_out(self, experts: Sequence[int]) -> None:
        """Exclude experts from the choice and from the softmax; an empty list includes all."""
        number, chosen = self.config.groups or (1, 1)
        size, left_out = self.num_experts // number, torch.zeros(self.num_experts, dtype=torch.bool)
        left_out[list(experts)] = True
        fewest = size - int(left_out.view(number, size).sum(dim=1).max())
        require(
            fewest * chosen >= self.config.top_k,
            f"without: {fewest * chosen} of {self.num_experts} experts are left for a token that chooses "
            f"top_k={self.config.top_k}; remove fewer",
        )
        self.left_out = left_out.to(self.weight.device) if experts else None

    def _weigh(self, scores: Tensor, kept: Tensor | None) -> Tensor:
        """Return the weights of experts with these scores, `[N, k]`; `kept` None: nothing is dropped or padding."""
        config = self.config
        weight = scores if kept is None else torch.where(kept, scores, 0.0)
        if config.normalizes:
            weight = weight / weight.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).eps)
        return weight if config.gate_scale == 1 else weight * config.gate_scale

    def _logits(self, x: Tensor) -> Tensor:
        """Compute the logits, `[N, H] -> [N, E]`, in the dtype of `x`."""
        with fp32_products():
            return F.linear(x, self.weight.to(x.dtype))

    def _scores(self, logits: Tensor, probs: Tensor) -> Tensor:
        """Return the weights before normalisation, `[N, E]`."""
        return probs

    def _capacity(self, num_tokens: int) -> int | None:
        """Return the capacity of an expert; None where nothing is dropped."""
        config = self.config
        if not (config.token_dropping if self.training else config.eval_token_dropping):
            return None
        factor = config.train_capacity_factor if self.training else config.eval_capacity_factor
        return capacity(num_tokens, self.num_experts, config.top_k, factor, config.min_capacity)

    def _choose(self, logits: Tensor, context: RoutingContext, draw: RoutingNoise) -> Tensor:
        """Choose the k experts of each token, `[N, k]`, first choice first."""
        config, training = self.config, self.training
        logits = self._selectable(logits.detach())
        if config.top_k > 2:
            return logits.topk(config.top_k, dim=-1).indices
        if config.top_k == 1:
            if config.noise == "rsample" and training:
                logits = logits + draw.gumbel(logits.shape)
            return logits.argmax(dim=-1, keepdim=True)
        first = logits.argmax(dim=-1, keepdim=True)
        if config.second_expert == "sample" and training:
            # The Gumbel-max trick: the argmax of logits + Gumbel noise is a sample of their softmax.
            logits = logits + draw.gumbel(logits.shape)
        second = logits.scatter(1, first, float("-inf")).argmax(dim=-1, keepdim=True)
        return torch.cat([first, second], dim=-1)

    def _selectable(self, scores: Tensor, summed: int = 1) -> Tensor:
        """Replace the scores, `[N, E]`, of experts that a token cannot choose by -inf: left out, or outside its best groups.

        A group's score is the sum of its `summed` highest.
        """
        if self.left_out is not None:
            scores = scores.masked_fill(self.left_out, float("-inf"))
        if self.config.groups is None:
            return scores
        number, chosen = self.config.groups
        grouped = scores.unflatten(1, (number, self.num_experts // number))  # [N, G, E / G]
        group_scores = grouped.topk(summed, dim=-1).values.sum(dim=-1)  # [N, G]
        outside = torch.ones_like(group_scores, dtype=torch.bool)
        outside = outside.scatter(1, group_scores.topk(chosen, dim=-1).indices, False)
        return grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)

    def _within_capacity(
        self, capacity: int | None, expert: Tensor, probs: Tensor, token_mask: Tensor | None, draw: RoutingNoise
    ) -> Tensor:
        """Return which assignments are kept, `[N, k]` bool: the first `capacity` of each expert's queue."""
        config = self.config
        requested = torch.ones_like(expert, dtype=torch.bool)
        if token_mask is not None:
            requested = requested & token_mask.unsqueeze(-1)
        if capacity is None:
            return requested
        num_tokens, top_k = expert.shape
        # The queue: assignments in order of priority. Ties keep token order (stable sort).
        if top_k == 1:
            queue = torch.arange(num_tokens, device=expert.device)
            if config.random_token_selection and self.training:
                queue = draw((num_tokens,)).argsort(descending=True)  # the highest draws first
        elif top_k == 2:
            # All first choices before any second one, each in token order.
            queue = torch.arange(num_tokens * 2, device=expert.device).view(num_tokens, 2).t().flatten()
        else:
            queue = probs.detach().gather(1, expert).flatten().argsort(descending=True, stable=True)
        wanted = torch.where(requested, expert, self.num_experts).flatten()[queue]  # padding: no expert
        by_expert = wanted.argsort(stable=True)  # each expert's queue becomes contiguous
        sorted_expert = wanted[by_expert]
        lengths = count(wanted, self.num_experts + 1)
        queue_start = lengths.cumsum(0) - lengths
        place_in_queue = torch.arange(len(queue), device=expert.device) - queue_start[sorted_expert]
        kept = torch.empty_like(requested).flatten()
        kept[queue[by_expert]] = place_in_queue < capacity
        return kept.view_as(requested) & requested


def build_router(config: GPTConfig, block: int) -> Router:
    """Build the router of a block: the paper's, or the one that `config.moe.router` names."""
    assert config.moe is not None
    num_experts, settings = experts_at(config, block), config.moe.router
    if settings is None:
        return TopKRouter(config.moe, config.hidden_size, num_experts, block)
    read = replace(config, moe=settings.as_read(config.moe))
    router: Router = settings.build(read, block)
    return router
