"""The gradients of a DeepSpeed engine's step: their norm before the step, a way to discard them, and fixes of the engine.

The engine skips a step whose norm is not finite, as after an fp16 overflow. Here the norm is computed once, before the step; the
engine is given that norm, or infinity if the step is to be skipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, distributed, nn

from nlgmoe.non_finite import squared_norm


@torch.no_grad()
def global_grad_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Compute the L2 norm of the whole model's gradient, in which every expert counts once. A collective."""
    device = parameters[0].device
    dense, experts = torch.zeros((), device=device), torch.zeros((), device=device)
    for parameter in parameters:
        if parameter.grad is None:
            continue
        square = parameter.grad.float().square().sum()
        if is_moe_param(parameter):
            experts += square / _replicas(parameter)
        else:
            dense += square
    distributed.all_reduce(experts)
    return (dense + experts).sqrt()


def _replicas(parameter: nn.Parameter) -> int:
    """Return the number of ranks that hold a parameter."""
    if not is_moe_param(parameter):
        return distributed.get_world_size()
    group = deepspeed_groups._get_expert_data_parallel_group(parameter.group_name)  # type: ignore[attr-defined]
    return distributed.get_world_size(group)


def _scaled_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return a gradient that all its ranks hold, scaled so that the sum of their squared norms is its own."""
    return None if parameter.grad is None else parameter.grad.float() / math.sqrt(_replicas(parameter))


def _gradient_fragment(parameter: nn.Parameter) -> Tensor | None:
    """Return the part of a gradient that ZeRO keeps on this rank, as `safe_get_full_grad` reads it; None if there is none."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    fragment: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
    address = mapping.lp_fragment_address
    return fragment.narrow(0, address.start, address.numel) if len(fragment) == parameter.numel() else fragment


def loss_scaler(engine: Any) -> Any:
    """Return fp16's dynamic loss scaler, which needs ZeRO 1 or 2 here; None in other precisions."""
    return engine.optimizer.loss_scaler if engine.fp16_enabled() else None


class EngineGradients:
    """`StepGradients` (`nlgmoe/non_finite.py`) of an engine, for all of its steps.

    Args:
        engine: a DeepSpeed engine with its optimizer.
    """

    def __init__(self, engine: Any) -> None:
        self._scaler = loss_scaler(engine)
        self._engine = engine
        self._zero = bool(engine.zero_optimization())
        self._norm = torch.zeros(())  # of the current step, times the loss scale; infinite if it was discarded
        self._measured = False
        self._parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        if self._zero:
            self._patch_zero()
        else:
            self._patch_stage_0()

    def of_step(self) -> EngineGradients:
        """Return the gradients of the coming step, after the backward pass of its last micro-batch."""
        self._measured = False
        if self._zero:
            self._engine.optimizer._wait_for_offload_copies()
        return self

    def norm(self) -> Tensor:
        """See `StepGradients`. Computed once a step."""
        if not self._measured:
            self._norm = self._zero_norm() if self._zero else global_grad_norm(self._parameters)
            self._measured = True
        return self._norm / self._scale

    def can_lower_loss_scale(self) -> bool | None:
        """See `StepGradients`."""
        return None if self._scaler is None else bool(self._scaler.cur_scale > self._scaler.min_scale)

    def squared_norms(self, parts: Sequence[Sequence[nn.Parameter]]) -> Tensor:
        """See `StepGradients`. ZeRO shards every gradient over the ranks that share it; else each holds it whole."""
        local_part = _gradient_fragment if self._zero else _scaled_gradient
        device = self._parameters[0].device  # with `offload_optimizer` the gradients are elsewhere
        squares = [squared_norm((local_part(one) for one in part), device).to(device) for part in parts]
        return torch.stack(squares) / self._scale**2

    @property
    def _scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.cur_scale)

    def full_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """See `StepGradients`."""
        gradient: Tensor | None = safe_get_full_grad(parameter)
        return gradient

    def clip(self, value: float, algorithm: str | None) -> None:
        """Do nothing: the engine clips in its step."""

    def discard(self) -> None:
        """See `StepGradients`: the engine skips a step with an infinite norm."""
        self._norm = torch.full_like(self._norm, torch.inf)
        if not self._zero:
            for parameter in self._parameters:
                parameter.grad = None  # AdamW without a wrapper does not check the norm

    def _patch_zero(self) -> None:
        """Use the norm computed here, and skip ZeRO's own overflow check, which would read all gradients once more."""
        optimizer = self._engine.optimizer
        self._zero_norm = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda norm_type=2: self._norm
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False  # `StepGuard` has decided about that before the step
        else:
            optimizer.check_grad_overflow = True  # otherwise ZeRO ignores the norm in bf16
            optimizer.check_overflow = lambda partition_gradients=True: None
            optimizer._update_scale = lambda overflow: None  # the scale is always 1; this would only repeat a warning

    def _patch_stage_0(self) -> None:
        """Fix what DeepSpeed 0.19.8 does wrong without ZeRO.

        Clipping: it averages the ranks' norms, which is wrong if ranks hold different experts (issue #8475), and omits experts in
        half precision (pull request #8613). Adam: in half precision it takes a step with zero gradients to allocate the moments,
        which decays the weights and counts in the bias correction.
        """
        engine, optimizer = self._engine, self._engine.optimizer

        def clip() -> None:
            engine._global_grad_norm = self._norm
            factor = (engine.gradient_clipping() / (self._norm + 1e-6)).clamp(max=1.0)
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

        engine.clip_fp32_gradients = clip
        if isinstance(optimizer, FP16_UnfusedOptimizer):
            unscale_and_clip = optimizer.unscale_and_clip_grads

            def unscale_and_clip_by_global_norm(norm: Any, apply_scale: bool = True) -> Any:
                optimizer._global_grad_norm = self._norm
                return unscale_and_clip(self._norm, apply_scale)

            optimizer.unscale_and_clip_grads = unscale_and_clip_by_global_norm
            optimizer.overflow_checker.check = lambda: bool(self._norm.isinf())
            optimizer.refresh_fp32_params()
            for state in optimizer.optimizer.state.values():
                state["step"].zero_()
