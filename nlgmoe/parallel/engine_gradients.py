"""The gradients of a DeepSpeed engine's step: their norm before the step, and a way to discard them.

The engine skips a step whose norm is not finite, as after an fp16 overflow. Here the norm is computed once, before the step; the
engine is given that norm, or infinity if the step is to be skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from typing_extensions import override

from nlgmoe.non_finite import StepGradients, squared_norm


def _gradient_fragment(parameter: nn.Parameter) -> Tensor | None:
    """Return the part of a gradient that ZeRO keeps on this rank, as `safe_get_full_grad` reads it; None if there is none."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    fragment: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
    address = mapping.lp_fragment_address
    return fragment.narrow(0, address.start, address.numel) if len(fragment) == parameter.numel() else fragment


def loss_scaler(engine: Any) -> Any:
    """Return fp16's dynamic loss scaler; None in other precisions."""
    return engine.optimizer.loss_scaler if engine.fp16_enabled() else None


class EngineGradients(StepGradients):
    """The gradients of an engine, for all of its steps.

    Args:
        engine: a DeepSpeed engine with its optimizer.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(())  # ZeRO keeps the gradients, not the parameters
        self._loss_scaler = loss_scaler(engine)
        self._engine = engine
        self._norm = torch.zeros(())  # of the current step, times the loss scale; infinite if it was discarded
        self._measured = False
        self._patch_zero()

    def of_step(self) -> EngineGradients:
        """Return the gradients of the coming step, after the backward pass of its last micro-batch."""
        self._measured = False
        self._engine.optimizer._wait_for_offload_copies()
        return self

    @override
    def norm(self) -> Tensor:
        """Return the norm, computed once a step. A collective."""
        if not self._measured:
            self._norm = self._zero_norm()
            self._measured = True
        return self._norm / self._scale

    @override
    def can_lower_loss_scale(self) -> bool | None:
        """Return True if DeepSpeed's loss scale is above its lowest value; None if there is no loss scale."""
        return None if self._loss_scaler is None else bool(self._loss_scaler.cur_scale > self._loss_scaler.min_scale)

    @override
    def squared_norms(self, parts: Sequence[Sequence[nn.Parameter]]) -> Tensor:
        """Return terms of the squared norms: ZeRO shards every gradient over the ranks that share it."""
        device = next(self._engine.module.parameters()).device  # with `offload_optimizer` the gradients are elsewhere
        squares = [
            squared_norm((_gradient_fragment(parameter) for parameter in part), device).to(device) for part in parts
        ]
        return torch.stack(squares) / self._scale**2

    @property
    def _scale(self) -> float:
        return 1.0 if self._loss_scaler is None else float(self._loss_scaler.cur_scale)

    @override
    def full_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the gradient of one parameter, gathered from the ranks that share it. A collective."""
        gradient: Tensor | None = safe_get_full_grad(parameter)
        return gradient

    @override
    def clip(self, value: float, algorithm: str | None) -> None:
        """Do nothing: the engine clips in its step."""

    @override
    def discard(self) -> None:
        """Make the norm infinite: the engine then skips the step."""
        self._norm = torch.full_like(self._norm, torch.inf)

    def _patch_zero(self) -> None:
        """Use the norm computed here, and skip ZeRO's own overflow check, which would read all gradients once more."""
        optimizer = self._engine.optimizer
        self._zero_norm = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda norm_type=2: self._norm
        if self._loss_scaler is not None:
            self._loss_scaler.raise_error_at_min_scale = False  # `StepGuard` has handled that before the step
        else:
            optimizer.check_grad_overflow = True  # otherwise ZeRO ignores the norm in bf16
            optimizer.check_overflow = lambda partition_gradients=True: None
            optimizer._update_scale = lambda overflow: None  # the scale is always 1; this would only repeat a warning
