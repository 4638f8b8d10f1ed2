"""Checks of the results of routers and expert networks, which may be a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from nlgmoe.config import GPTConfig
from nlgmoe.layers.router import Router, Routing
from nlgmoe.parts import ExpertConfig, Stack
from nlgmoe.validation import RunError, SettingError, require

PAPER_LOSSES = frozenset(
    {"balance_loss", "z_loss", "distillation_loss"}
)  # `train/NAME` of the losses without a router's own


def build_router(config: GPTConfig, layer_index: int, num_experts: int) -> Router:
    """Build the router that `config.moe.router` names."""
    assert config.moe is not None and config.moe.router is not None
    router, name = config.moe.router.build(config, layer_index), type(config.moe.router).__name__
    if not isinstance(router, Router):
        raise SettingError(f"{name}.build returned a {type(router).__name__}; return a Router")
    require(
        router.num_experts == num_experts,
        f"{name}.build returned a Router of {router.num_experts} experts for a layer of {num_experts}; experts_at(config, "
        "layer_index) is their number",
    )
    return router


def require_routing(routing: Any, router: Router, num_tokens: int, top_k: int) -> Routing:
    """Check what a router returned, by its types and shapes: no value is read from the device.

    Args:
        routing: result of the router.
        router: the router.
        num_tokens: N.
        top_k: k.
    """
    name, shape, experts = type(router).__name__, (num_tokens, top_k), router.num_experts
    if not isinstance(routing, Routing):
        raise RunError(f"{name} returned a {type(routing).__name__}; return an nlgmoe.Routing")
    for field_name in ("expert", "weight", "kept"):
        value = getattr(routing, field_name)
        if value.shape != shape:
            raise RunError(
                f"{name} returned {field_name} of {list(value.shape)}, not [tokens, top_k] = {list(shape)}; set "
                "model.config.moe.top_k to the number of experts that it chooses"
            )
    if routing.expert.is_floating_point() or routing.expert.dtype == torch.bool:
        raise RunError(f"{name} returned expert of {routing.expert.dtype}; return numbers of experts, torch.int64")
    if routing.weight.dtype in (torch.bfloat16, torch.float16):
        raise RunError(f"{name} returned weights of {routing.weight.dtype}; compute them in fp32")
    if routing.kept.dtype != torch.bool:
        raise RunError(f"{name} returned kept of {routing.kept.dtype}, not torch.bool")
    gate = [list(value.shape) for value in (routing.logits, routing.probs) if value is not None]
    if routing.num_experts != experts or any(size != [num_tokens, experts] for size in gate):
        raise RunError(
            f"{name} returned num_experts={routing.num_experts} and logits or probs of {gate}, in a layer of {experts} experts "
            f"and {num_tokens} tokens"
        )
    for loss_name, loss in routing.losses.items():
        if not isinstance(loss, Tensor) or loss.ndim > 0:
            raise RunError(f"{name}'s loss {loss_name} is no tensor without dimensions; return a mean over tokens")
        if not loss_name.endswith("_loss") or loss_name in PAPER_LOSSES:
            raise RunError(f"{name}'s loss {loss_name} needs a name of its own that ends with _loss; rename it")
    return routing


def require_rows(y: Any, x: Tensor, network: ExpertConfig) -> Tensor:
    """Check that an expert network returned a row for each row of `x`, `[M, H]`."""
    if not isinstance(y, Tensor) or y.shape != x.shape:
        returned = list(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise RunError(
            f"{type(network).__name__}.forward returned {returned} for rows of {list(x.shape)}; return one row for each"
        )
    return y


def stacks_of(network: ExpertConfig, hidden_size: int, ffn_size: int) -> Mapping[str, Stack]:
    """Return the matrices that an expert network declares."""
    name, stacks = type(network).__name__, network.weights(hidden_size, ffn_size)
    require(isinstance(stacks, Mapping), f"{name}.weights returned a {type(stacks).__name__}; return a dictionary")
    for key, stack in stacks.items():
        *sizes, role = stack if isinstance(stack, tuple | list) and len(stack) == 3 else (None,)
        whole = len(sizes) == 2 and all(isinstance(size, Integral) and size > 0 for size in sizes)
        require(
            whole and role in ("expand", "project") and str(key).isidentifier(),
            f"{name}.weights has {key!r}: {stack}; write name: (inputs, outputs, 'expand' or 'project'), with whole numbers",
        )
    return stacks
