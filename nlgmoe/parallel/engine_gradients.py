"""The gradients of a DeepSpeed engine's step: their norm before the step, a way to drop them, and what has to be set right.

The engine drops the gradients of a step whose norm is not finite, as it does with an fp16 overflow. Here the norm is computed
once, before the step, for whoever decides about it; the engine is told what it was, or that it is infinite.
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

from nlgmoe.non_finite import square_of


@torch.no_grad()
def global_grad_norm(parameters: list[nn.Parameter]) -> Tensor:
    """L2 norm of the whole model's gradient: every expert once, wherever and however often it is held."""
    device = parameters[0].device
    dense, experts = torch.zeros((), device=device), torch.zeros((), device=device)
    for parameter in parameters:
        if parameter.grad is None:
            continue
        square = parameter.grad.float().square().sum()
        if is_moe_param(parameter):
            experts += square / _holders(parameter)
        else:
            dense += square
    distributed.all_reduce(experts)
    return (dense + experts).sqrt()


def _holders(parameter: nn.Parameter) -> int:
    """How many ranks hold a parameter."""
    if not is_moe_param(parameter):
        return distributed.get_world_size()
    group = deepspeed_groups._get_expert_data_parallel_group(parameter.group_name)  # type: ignore[attr-defined]
    return distributed.get_world_size(group)


def _share(parameter: nn.Parameter) -> Tensor | None:
    """A gradient that its holders have alike, so that the sum of their squares is its own."""
    return None if parameter.grad is None else parameter.grad.float() / math.sqrt(_holders(parameter))


def _fragment(parameter: nn.Parameter) -> Tensor | None:
    """What ZeRO has left of a gradient on this rank, as `safe_get_full_grad` reads it; None if nothing."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    fragment: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
    place = mapping.lp_fragment_address
    return fragment.narrow(0, place.start, place.numel) if len(fragment) == parameter.numel() else fragment


def loss_scaler(engine: Any) -> Any:
    """fp16's dynamic loss scale, which needs ZeRO 1 or 2 here; None in other precisions."""
    return engine.optimizer.loss_scaler if engine.fp16_enabled() else None


class EngineGradients:
    """`StepGradients` (`nlgmoe/non_finite.py`) of an engine, for all of its steps.

    Args:
        engine: a DeepSpeed engine with its optimizer.
    """

    def __init__(self, engine: Any) -> None:
        self._scaler = loss_scaler(engine)
        self._engine = engine
        self._norm = torch.zeros(())  # of the step at hand, times the loss scale; infinite if it was dropped
        self._measured = False
        self._parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        if engine.zero_optimization():
            self._set_right_zero()
        else:
            self._set_right_stage_0()

    @property
    def complete(self) -> bool:
        """Whether the last micro-batch of the step has been through the backward pass."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    def begin(self) -> None:
        """Forget the last step's; after the backward pass, as often as it is asked for."""
        self._measured = False
        if self._engine.zero_optimization():
            self._engine.optimizer._wait_for_offload_copies()

    def norm(self) -> Tensor:
        """Their L2 norm; computed once a step, which all ranks do together."""
        if not self._measured:
            self._norm = self._zero_norm() if self._engine.zero_optimization() else global_grad_norm(self._parameters)
            self._measured = True
        return self._norm / self._scale

    def scale_can_fall(self) -> bool | None:
        """See `StepGradients`; the host knows it."""
        return None if self._scaler is None else bool(self._scaler.cur_scale > self._scaler.min_scale)

    def squares(self, parts: Sequence[Sequence[nn.Parameter]]) -> Tensor:
        """See `StepGradients`: ZeRO divides every gradient among the ranks that have it; else each of them holds it whole."""
        own = _fragment if self._engine.zero_optimization() else _share
        device = self._parameters[0].device  # with `offload_optimizer` the gradients are elsewhere
        squares = [square_of((own(one) for one in part), device).to(device) for part in parts]
        return torch.stack(squares) / self._scale**2

    @property
    def _scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.cur_scale)

    def full(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of one parameter; a collective."""
        gradient: Tensor | None = safe_get_full_grad(parameter)
        return gradient

    def clip(self, value: float, algorithm: str | None) -> None:
        """Nothing: the engine clips in its step."""

    def drop(self) -> None:
        """Let the engine's step drop them."""
        self._norm = torch.full_like(self._norm, torch.inf)
        if not self._engine.zero_optimization():
            for parameter in self._parameters:
                parameter.grad = None  # without a wrapper around AdamW nothing else would keep it from its step

    def _set_right_zero(self) -> None:
        """Let the norm alone decide where there is no loss scale: another pass over all gradients says no more than it."""
        optimizer = self._engine.optimizer
        self._zero_norm = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda norm_type=2: self._norm
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = (
                False  # `scale_can_fall` says so before the step, to who decides about it
            )
        else:
            optimizer.check_grad_overflow = True  # in bf16 the norm is looked at only then
            optimizer.check_overflow = lambda partition_gradients=True: None
            optimizer._update_scale = lambda overflow: None  # a constant 1; it would only warn, a second time

    def _set_right_stage_0(self) -> None:
        """Set right what DeepSpeed 0.19.8 does where ZeRO is off; under ZeRO 1 and 2 it is right.

        Clipping: it averages the ranks' norms, which is not the norm when ranks hold different experts (issue #8475), and
        leaves experts out in half precision (pull request #8613). Adam: in half precision it takes a step with zero gradients
        to allocate the moments, which decays the weights and counts in the bias correction.
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

            def unscale_and_clip_by_true_norm(norm: Any, apply_scale: bool = True) -> Any:
                optimizer._global_grad_norm = self._norm
                return unscale_and_clip(self._norm, apply_scale)

            optimizer.unscale_and_clip_grads = unscale_and_clip_by_true_norm
            optimizer.overflow_checker.check = lambda: bool(self._norm.isinf())
            optimizer.refresh_fp32_params()
            for state in optimizer.optimizer.state.values():
                state["step"].zero_()
