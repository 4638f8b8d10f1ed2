"""What routers and expert networks, which may be a user's own, have to return."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from nlgmoe.config import GPTConfig
from nlgmoe.layers.router import Router, Routing
from nlgmoe.parts import ExpertConfig, Stack
from nlgmoe.validation import RunError, require

# `train/NAME` of the metrics that a run logs without a router's own losses (docs/metrics.md)
_TAKEN = frozenset(
    (
        *("loss", "balance_loss", "z_loss", "distillation_loss", "teacher_agreement"),
        *("lr", "seq_len", "tokens", "skipped_steps", "grad_norm", "grad_norm_dense"),
        *("tokens_per_second", "tflops_per_second", "mfu", "flops"),
    )
)


def build_router(config: GPTConfig, layer_index: int, num_experts: int) -> Router:
    """Build the router that `config.moe.router` names.

    Raises:
        SettingError: it builds no `Router` of that many experts.
    """
    assert config.moe is not None and config.moe.router is not None
    router, name = config.moe.router.build(config, layer_index), type(config.moe.router).__name__
    require(isinstance(router, Router), f"{name}.build returned a {type(router).__name__}; return a Router")
    found: Router = router
    require(
        found.num_experts == num_experts,
        f"{name}.build returned a Router of {found.num_experts} experts for a layer of {num_experts}; experts_at(config, "
        "layer_index) is their number",
    )
    return found


def require_routing(found: Any, router: Router, num_tokens: int, top_k: int) -> Routing:
    """Check what a router returned, by its types and shapes: no value is read from the device.

    Args:
        found: that the router returned.
        router: which.
        num_tokens: N.
        top_k: k.

    Raises:
        ValueError: it is no `Routing`, or one of another shape or type, or it has a loss that is no scalar or has a taken name.
    """
    name, shape = type(router).__name__, (num_tokens, top_k)
    if not isinstance(found, Routing):
        raise RunError(f"{name} returned a {type(found).__name__}; return an nlgmoe.Routing")
    for field_name in ("expert", "weight", "kept"):
        if not isinstance(one := getattr(found, field_name), Tensor):
            raise RunError(f"{name} returned {field_name} of type {type(one).__name__}; return a tensor")
    if found.expert.is_floating_point() or found.expert.dtype == torch.bool:
        raise RunError(f"{name} returned expert of {found.expert.dtype}; return numbers of experts, torch.int64")
    if found.expert.shape != shape:
        raise RunError(
            f"{name} chose experts {list(found.expert.shape)}, not [tokens, top_k] = {list(shape)}; set model.config.moe.top_k "
            "to what it chooses"
        )
    if found.weight.dtype in (torch.bfloat16, torch.float16):
        raise RunError(f"{name} returned weights of {found.weight.dtype}; compute them in fp32")
    for field_name in ("weight", "kept"):
        if (one := getattr(found, field_name)).shape != shape:
            raise RunError(f"{name} returned {field_name} of {list(one.shape)}, not [tokens, top_k] = {list(shape)}")
    if found.kept.dtype != torch.bool:
        raise RunError(f"{name} returned kept of {found.kept.dtype}, not torch.bool")
    of_gate = [one for one in (found.logits, found.probs) if one is not None]
    if found.num_experts != router.num_experts or any(one.shape != (num_tokens, found.num_experts) for one in of_gate):
        raise RunError(
            f"{name} returned num_experts={found.num_experts} and logits or probs of "
            f"{[list(one.shape) for one in of_gate]}, in a layer of {router.num_experts} experts and {num_tokens} tokens"
        )
    if not isinstance(found.losses, Mapping):
        raise RunError(f"{name} returned losses of type {type(found.losses).__name__}; return a dictionary")
    for loss_name, loss in found.losses.items():
        if not isinstance(loss, Tensor) or loss.ndim > 0:
            raise RunError(f"{name}'s loss {loss_name} is no tensor without dimensions; return a mean over tokens")
        if loss_name in _TAKEN:
            raise RunError(f"{name}'s loss {loss_name} would be logged in place of train/{loss_name}; rename it")
    return found


def require_rows(found: Any, x: Tensor, network: ExpertConfig) -> Tensor:
    """Check what an expert network returned for the rows `x`, `[M, H]`.

    Raises:
        ValueError: it is no tensor of their shape.
    """
    if not isinstance(found, Tensor) or found.shape != x.shape:
        what = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise RunError(
            f"{type(network).__name__}.forward returned {what} for rows of {list(x.shape)}; return one row for each"
        )
    return found


def stacks_of(network: ExpertConfig, hidden_size: int, ffn_size: int) -> Mapping[str, Stack]:
    """Return the matrices that an expert network declares.

    Raises:
        SettingError: it declares no mapping of a name to (inputs, outputs, role).
    """
    name, found = type(network).__name__, network.weights(hidden_size, ffn_size)
    require(isinstance(found, Mapping), f"{name}.weights returned a {type(found).__name__}; return a dictionary")
    for key, stack in found.items():
        *sizes, role = stack if isinstance(stack, tuple | list) and len(stack) == 3 else (None,)
        whole = len(sizes) == 2 and all(isinstance(size, Integral) and size > 0 for size in sizes)
        require(
            whole and role in ("expand", "project") and str(key).isidentifier(),
            f"{name}.weights has {key!r}: {stack}; write name: (inputs, outputs, 'expand' or 'project'), with whole numbers",
        )
    return found
