"""NaN or infinity in a step's loss or gradients: noticed before weights change, then the run stops or the step is skipped.

One number decides, the same on every rank: the norm of the whole model's gradient, which clipping needs anyway, or the loss.
Where a dynamic loss scale is at work (fp16) gradients overflow now and then: such a step is skipped and counted, and the scale
falls. Only at the lowest scale do gradients decide as elsewhere.

A finite step can still write weights that are not, such as with a learning rate that is far too high. What they compute then is
not finite either: the next step finds them, and the end of the run looks for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed, nn
from torch.amp import GradScaler

from nlgmoe.checkpoint.agreement import AgreedError


@dataclass(frozen=True)
class NonFinite:
    """What to do about a step whose loss or gradients are NaN or infinite; weights and moments never see them.

    Attributes:
        action: `stop` ends the run with an error that names step, rank and layer; `skip` leaves weights and moments as they
            are, warns, and goes on with the next data.
        limit: most steps in a row that `skip` leaves out; at the next one the run stops all the same.
    """

    action: Literal["stop", "skip"] = "stop"
    limit: int = 10

    def __post_init__(self) -> None:
        if self.action not in ("stop", "skip"):
            raise ValueError(f"action={self.action} must be stop or skip")
        if self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1 step; to stop at the first one set action to stop")


class NonFiniteError(AgreedError):
    """A step that could not be taken, or should not have been."""


class StepGradients(Protocol):
    """The gradients of a step that is about to be taken, summed over its micro-batches and averaged over ranks."""

    def norm(self) -> Tensor:
        """L2 norm of all of them, every expert once, the same on every rank; not finite if one of them is not."""
        ...

    def scale_can_fall(self) -> bool | None:
        """Whether the dynamic loss scale, read from the device, is above its lowest; None where there is none."""
        ...

    def squares(self, parts: Sequence[Sequence[nn.Parameter]]) -> Tensor:
        """Squared L2 norms of parts of the model, `[parts]`: the sum of what all ranks return. No collective."""
        ...

    def full(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of one parameter of this rank. All ranks ask together, in the same order."""
        ...

    def clip(self, value: float, algorithm: str | None) -> None:
        """Clip them as Lightning's `gradient_clip_val` and `gradient_clip_algorithm` say."""
        ...

    def drop(self) -> None:
        """Let the step change nothing: no weight, no moment, no count of AdamW's."""
        ...


@runtime_checkable
class HoldsGradients(Protocol):
    """A strategy that keeps gradients elsewhere than in `parameter.grad`."""

    def step_gradients(self) -> StepGradients | None:
        """Those of the step about to be taken; None after a micro-batch that does not end a step."""
        ...


class LocalGradients:
    """Gradients that every rank holds whole: one process, or `ddp`.

    Args:
        parameters: of the model.
        scaler: of fp16's loss scale, whose lowest value is taken to be 1; it has no bound of its own.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], scaler: GradScaler | None = None) -> None:
        self._scaler = scaler
        self._parameters = [parameter for parameter in parameters if parameter.grad is not None]

    @cached_property
    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([self.full(parameter) for parameter in self._parameters])  # type: ignore[misc]

    def norm(self) -> Tensor:
        """See `StepGradients`."""
        return self._norm

    def scale_can_fall(self) -> bool | None:
        """See `StepGradients`."""
        return None if self._scaler is None else self._scaler.get_scale() > 1

    def squares(self, parts: Sequence[Sequence[nn.Parameter]]) -> Tensor:
        """See `StepGradients`."""
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        device = next(one.device for part in parts for one in part)  # a router may have no parameters
        return torch.stack([square_of((one.grad for one in part), device) for part in parts]) / ranks

    def full(self, parameter: nn.Parameter) -> Tensor | None:
        """See `StepGradients`."""
        return parameter.grad

    def clip(self, value: float, algorithm: str | None) -> None:
        """See `StepGradients`."""
        if algorithm == "value":
            torch.nn.utils.clip_grad_value_(self._parameters, value)
        else:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, value, self._norm)

    def drop(self) -> None:
        """See `StepGradients`: AdamW passes over parameters without a gradient."""
        for parameter in self._parameters:
            parameter.grad = None


def square_of(gradients: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Squared L2 norm of those that are there, in fp32, a scalar."""
    there = [gradient.float() for gradient in gradients if gradient is not None]
    return torch.nn.utils.get_total_norm(there).square() if there else torch.zeros((), device=device)


def _written_before(fp16: str = "") -> str:
    return (
        "a step before has made it so, which skipping steps cannot undo. Go on from the last checkpoint, or one before it, with "
        f"{fp16}a lower model.optimizer.lr"
    )


class StepGuard:
    """Decides whether a step may be taken, and counts those that may not.

    Args:
        settings: what to do.

    Attributes:
        skipped: steps left out since the run began, those among them whose gradients overflowed under fp16's loss scale.
        in_a_row: of them, those since the last step that was taken; without overflows.
    """

    def __init__(self, settings: NonFinite) -> None:
        self.settings = settings
        self.skipped = self.in_a_row = 0

    def allows(
        self,
        step: int,
        loss: float,
        norm: float,
        scale_can_fall: Callable[[], bool | None],
        bad_weight: Callable[[], str | None],
        find_source: Callable[[], str],
    ) -> bool:
        """Whether the step may be taken.

        Args:
            step: its number, as in the logger.
            loss: of its micro-batches and all ranks.
            norm: of its gradients.
            scale_can_fall: see `StepGradients`; asked only where one of the two is not finite.
            bad_weight: names a weight that is not finite, if one is; called only when it is needed, by all ranks.
            find_source: says what else was not finite first; likewise.

        Raises:
            NonFiniteError: it may not, and the run is to stop; on every rank.
        """
        name, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        if math.isfinite(value):
            self.in_a_row = 0
            return True
        can_fall = scale_can_fall()
        if can_fall and math.isfinite(loss):
            self.skipped += 1
            return False
        fp16 = "" if can_fall is None else "trainer.precision=bf16-mixed, "
        what = f"step {step}: the {name} is {value}; first not finite: "
        if (weight := bad_weight()) is not None:
            raise NonFiniteError(f"{what}the weight {weight}; {_written_before(fp16)}")
        what += find_source()
        if self.settings.action == "stop":
            raise NonFiniteError(
                f"{what}; nothing was updated. Go on from the last checkpoint, or one before it, with {fp16}a lower "
                "model.optimizer.lr, or with model.non_finite.action set to skip"
            )
        if self.in_a_row == self.settings.limit:
            raise NonFiniteError(
                f"{what}; {self.in_a_row} steps in a row were skipped before it, which is model.non_finite.limit. Go on from an "
                f"earlier checkpoint with {fp16}a lower model.optimizer.lr"
            )
        self.skipped += 1
        self.in_a_row += 1
        rank_zero_warn(f"{what}; the step was skipped, {self.skipped} so far")
        return False

    def end(self, step: int, weight: str | None) -> None:
        """Look at what the last step has made.

        Args:
            step: the number of steps that were taken.
            weight: that is not finite, if one is.

        Raises:
            NonFiniteError: one is; on every rank.
        """
        if weight is not None:
            raise NonFiniteError(f"step {step}: the weight {weight} is not finite; {_written_before()}")

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
