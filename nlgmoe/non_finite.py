"""Detect NaN or infinity in a step's loss or gradients before weights change; then stop the run or skip the step.

The decision depends on the loss and on the norm of the whole model's gradient, which clipping needs anyway; both are equal on all
ranks. Under a dynamic loss scale (fp16) gradients overflow now and then: such a step is skipped and counted, and the scale is
lowered. At the lowest scale an overflow is treated as in other precisions.

A finite step can still write weights that are not finite, for example with a much too high learning rate. The next step detects
them by its loss; after the last step the weights are checked themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed, nn
from torch.amp import GradScaler

from nlgmoe.ranks import AllRanksError, gather
from nlgmoe.validation import RunError, require

SUMMED = 2**16  # values of a gradient that a CPU adds up at a time
EARLIER = "an earlier step wrote it, which skipping steps cannot undo"


@dataclass(frozen=True)
class NonFinite:
    """Handling of a step whose loss or gradients are NaN or infinite; it never changes weights and moments.

    Attributes:
        action: `stop` ends the run with an error that names step, rank and layer; `skip` leaves weights and moments
            unchanged, warns, and continues with the next data.
        limit: largest number of consecutive steps that `skip` skips; at the next one the run stops.
    """

    action: Literal["stop", "skip"] = "stop"
    limit: int = 10

    def __post_init__(self) -> None:
        require(self.action in ("stop", "skip"), f"action={self.action} must be stop or skip")
        require(self.limit >= 1, f"limit={self.limit} must be at least 1 step; action=stop stops at the first one")


class NonFiniteError(AllRanksError):
    """A step's loss or gradients, or the weights after it, are NaN or infinite."""


class StepGradients:
    """The gradients of the coming step, summed over its micro-batches and averaged over ranks.

    This class is for gradients that every rank holds whole: a single process, or `ddp`.

    Args:
        scaler: fp16's gradient scaler, which has no lower bound; a scale of 1 is taken as its lowest.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], scaler: GradScaler | None = None) -> None:
        self._scaler = scaler
        self._parameters = [parameter for parameter in parameters if parameter.grad is not None]

    @property
    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    @cached_property
    def _total_norm(self) -> Tensor:
        return total_norm(self._gradients)

    def norm(self) -> Tensor:
        """Return the L2 norm of the whole model's gradient, in which every expert counts once, on every rank. A collective."""
        return self._total_norm

    def can_lower_loss_scale(self) -> bool | None:
        """Return True if the dynamic loss scale is above its lowest value; None if there is no loss scale."""
        return None if self._scaler is None else self._scaler.get_scale() > 1

    def squared_norms(self, components: Sequence[Sequence[nn.Parameter]]) -> Tensor:
        """Return terms whose sum over ranks is each component's squared gradient norm, `[components]`. No collective."""
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        # A router may have no parameters.
        device = next(parameter.device for component in components for parameter in component)
        norms = [squared_norm((parameter.grad for parameter in component), device) for component in components]
        return torch.stack(norms) / ranks

    def full_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the gradient of one parameter of this rank. A collective."""
        return parameter.grad

    def clip(self, norm: float, limit: float) -> None:
        """Clip to the norm `limit`, Lightning's `gradient_clip_val`.

        `norm` is that of `norm()` on the host, so that the factor is no device tensor, which half-precision gradients round.
        """
        exact = torch.tensor(norm, dtype=self._total_norm.dtype, device="cpu")
        factor = torch.clamp(limit / (exact + 1e-6), max=1.0)
        torch._foreach_mul_(self._gradients, factor)

    def discard(self) -> None:
        """Make the step change no weight, no moment and no step count of AdamW, which skips parameters without a gradient."""
        for parameter in self._parameters:
            parameter.grad = None


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Compute the L2 norm of one gradient or more, in at least fp32, as a scalar."""
    dtype = reduce(torch.promote_types, (gradient.dtype for gradient in gradients), torch.float32)
    if gradients[0].device.type == "cpu":
        # Squares are added up one by one there: of 2^26 values the norm would be 0.5% too small.
        gradients = [part for gradient in gradients for part in gradient.flatten().split(SUMMED)]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype)))


def squared_norm(gradients: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Compute the squared L2 norm of the gradients that are not None, in at least fp32, as a scalar."""
    present = [gradient for gradient in gradients if gradient is not None]
    return total_norm(present).square() if present else torch.zeros((), device=device)


class StepGuard:
    """Decide whether a step may be taken, and count skipped steps.

    Attributes:
        skipped: skipped steps since the run began, including those whose gradients overflowed under fp16's loss scale.
        in_a_row: skipped steps since the last step that was taken, without overflows.
    """

    def __init__(self, settings: NonFinite) -> None:
        self.settings = settings
        self.skipped = self.in_a_row = 0

    def allows(
        self, step: int, loss: float, norm: float, model: nn.Module, losses: Sequence[Tensor], gradients: StepGradients
    ) -> bool:
        """Return True if the step may be taken, False if it is to be skipped. A collective if loss or norm is not finite.

        Args:
            loss: sum of all logged losses, each the mean over micro-batches and ranks; only its finiteness is used.
        """
        name, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        if math.isfinite(value):
            self.in_a_row = 0
            return True
        can_lower = gradients.can_lower_loss_scale()
        if can_lower and math.isfinite(loss):
            self.skipped += 1
            return False
        fp16 = "" if can_lower is None else "trainer.precision=bf16-mixed, "
        problem = f"step {step}: the {name} is {value}; first not finite: "
        if (weight := first_bad_weight(model)) is not None:
            raise NonFiniteError(f"{problem}the weight {weight}; {EARLIER}. {_remedy(fp16)}")
        if math.isfinite(loss):
            problem += _bad_gradient(model, gradients)
        else:
            problem += _first_bad(["the loss"], [all(map(_finite, losses))]) or "the mean of finite losses"
        if self.settings.action == "stop":
            remedy = f"{_remedy(fp16)}, or with model.non_finite.action set to skip"
            raise NonFiniteError(f"{problem}; nothing was updated. {remedy}")
        if self.in_a_row >= self.settings.limit:
            before = f"{self.in_a_row} steps in a row were skipped before it, which is model.non_finite.limit"
            raise NonFiniteError(f"{problem}; {before}. {_remedy(fp16)}")
        self.skipped += 1
        self.in_a_row += 1
        rank_zero_warn(f"{problem}; the step was skipped, {self.skipped} so far")
        return False

    def check_weights(self, step: int, model: nn.Module) -> None:
        """Check the weights after the last of `step` steps. A collective."""
        if (weight := first_bad_weight(model)) is not None:
            raise NonFiniteError(f"step {step}: the weight {weight} is not finite; {EARLIER}. {_remedy()}")

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def _remedy(fp16: str = "") -> str:
    return f"Resume from the last checkpoint, or one before it, with {fp16}a lower model.optimizer.lr"


def first_bad_weight(model: nn.Module) -> str | None:
    """Return the first weight that holds NaN or infinity: `blocks.0.ffn.up.bias on rank 1`; None if there is none.

    A collective; all ranks get the same answer.
    """
    names, weights = zip(*model.named_parameters(), strict=True)
    return _first_bad(names, [_finite(weight) for weight in weights])


def require_finite_logits(model: nn.Module, logits: Tensor) -> None:
    """Check logits before they are used for text or a file."""
    if _finite(logits):
        return
    bad = next((name for name, value in model.named_parameters() if not _finite(value)), None)
    cause = f"the weight {bad} is not finite; use another checkpoint" if bad else "all weights are finite; use float32"
    raise RunError(f"the model's logits are NaN or infinite: {cause}")


def _bad_gradient(model: nn.Module, gradients: StepGradients) -> str:
    """Name the gradient that is not finite and nearest to the loss, and its ranks."""
    names, weights = zip(*reversed(list(model.named_parameters())), strict=True)
    finite = [_finite(gradients.full_gradient(weight)) for weight in weights]  # of all weights: each is a collective
    bad = _first_bad(names, finite)
    return f"the gradient of {bad}" if bad else "no single gradient, but their squares are too large for float32"


def _finite(value: Tensor | None) -> bool:
    return value is None or bool(value.detach().isfinite().all())


def _first_bad(names: Sequence[str], finite: Sequence[bool]) -> str | None:
    """Return the first name that is not finite on any rank, with those ranks: `name on rank 3`. A collective.

    Ranks may have different names, those of their experts, in the same order.
    """
    own = min(((index, names[index]) for index, is_finite in enumerate(finite) if not is_finite), default=None)
    firsts = gather(own)
    if (first := min((bad for bad in firsts if bad is not None), default=None)) is None:
        return None
    ranks = [rank for rank, bad in enumerate(firsts) if bad is not None and bad[0] == first[0]]
    where = "all ranks" if len(ranks) == len(firsts) > 1 else f"rank {', '.join(map(str, ranks))}"
    return f"{first[1]} on {where}"
