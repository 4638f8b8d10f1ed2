"""Cross-entropy from hidden states, with or without a teacher, in chunks of tokens, so that the logits of a whole batch never
exist.

Letters: N tokens, H hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class SoftTargets:
    """What a teacher says of the tokens of a batch.

    Attributes:
        logits: of the tokens of a slice, `[C, V]`, without gradient.
        weight: of the distillation loss.
        temperature: that both models' logits are divided by.
    """

    logits: Callable[[slice], Tensor]
    weight: float
    temperature: float


class DistilledLoss(NamedTuple):
    """A loss and its parts, scalars in at least fp32; only `loss` has a gradient.

    Attributes:
        loss: `language + weight * distillation`.
        language: the cross-entropy.
        distillation: `temperature^2 * KL(teacher || student)` of the distributions at the temperature.
        agreement: share of the tokens whose likeliest target is the same for both.
    """

    loss: Tensor
    language: Tensor
    distillation: Tensor
    agreement: Tensor


def cross_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    chunk_size: int,
    divisor: Tensor | None = None,
) -> Tensor:
    """Mean over unmasked tokens of `-log softmax(hidden @ unembedding.T)[target]`, in at least fp32.

    The logits of `chunk_size` tokens exist at a time. Their gradient is formed while they do (it needs nothing from
    above but a scale), so the backward pass recomputes no logits. Under autocast the GEMMs run in its dtype.

    Args:
        hidden: `[N, H]`.
        unembedding: `[V, H]`; pass exactly the rows of real tokens.
        targets: `[N]` int64.
        mask: `[N]` bool, False where a token counts for nothing; None counts all.
        chunk_size: tokens per chunk; memory is `chunk_size * V` values.
        divisor: scalar, what the sum over unmasked tokens is divided by; None: their number. With the mean of all ranks'
            numbers, the mean of the ranks' losses is the loss of all their tokens.

    Returns:
        A scalar; 0 if the mask is empty.
    """
    arguments = _prepared(hidden, unembedding, targets, mask, divisor)
    loss: Tensor = _ChunkedCrossEntropy.apply(*arguments, chunk_size, None)[0]
    return loss


def distilled_cross_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    chunk_size: int,
    divisor: Tensor | None,
    teacher: SoftTargets,
) -> DistilledLoss:
    """`cross_entropy` and the distillation loss, over the same tokens and with the same divisor; the arguments are its own.

    The teacher's logits too exist for `chunk_size` tokens at a time.
    """
    arguments = _prepared(hidden, unembedding, targets, mask, divisor)
    return DistilledLoss(*_ChunkedCrossEntropy.apply(*arguments, chunk_size, teacher))


def _prepared(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, mask: Tensor | None, divisor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and unembedding in the type of their product, the targets, and each token's weight."""
    counted = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    weight = counted.to(torch.promote_types(hidden.dtype, torch.float32))
    divisor = weight.sum() if divisor is None else divisor.to(weight.dtype)
    weight = weight / divisor.clamp_min(torch.finfo(weight.dtype).eps)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, unembedding = (t.to(torch.get_autocast_dtype(device)) for t in (hidden, unembedding))
    unembedding = unembedding.to(hidden.dtype)
    return hidden, unembedding, targets, weight


def token_losses(hidden: Tensor, unembedding: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """The cross-entropy of each token, `[N]`, in at least fp32 and without gradient; for evaluation."""
    with torch.no_grad():
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return torch.cat(
            [
                F.cross_entropy((h @ unembedding.to(h.dtype).t()).to(dtype), t, reduction="none")
                for h, t in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
            ]
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients of `sum_n weight_n * CE_n`, chunk by chunk; with a teacher also of what `DistilledLoss` adds."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        unembedding: Tensor,
        targets: Tensor,
        weight: Tensor,
        chunk_size: int,
        teacher: SoftTargets | None,
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_unembedding = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_unembedding = torch.zeros_like(unembedding, dtype=dtype) if needs_unembedding else None
        loss = hidden.new_zeros((), dtype=dtype)
        distillation, agreement = torch.zeros_like(loss), torch.zeros_like(loss)
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            h, target, w = hidden[part], targets[part, None], weight[part, None].to(dtype)  # [C, H], [C, 1], [C, 1]
            log_probs = (
                (h @ unembedding.t()).to(dtype).log_softmax(dim=-1)
            )  # [C, V]; two such exist at a time, never three; five with a teacher
            towards = None
            if teacher is not None:
                divergence, agrees, towards = _compare(log_probs, teacher.logits(part).to(dtype), teacher.temperature)
                distillation += (w * divergence).sum()
                agreement += (w * agrees).sum()
            picked = log_probs.gather(1, target)
            loss -= (w * picked).sum()
            if not (needs_hidden or needs_unembedding):
                continue
            grad = log_probs.exp_().scatter_(1, target, picked.expm1())  # d loss / d logits = w * (probs - onehot)
            if teacher is not None and towards is not None:
                grad.add_(towards, alpha=teacher.weight * teacher.temperature)
            if hidden.dtype == dtype:  # w goes to the narrower factor of each product
                if grad_hidden is not None:
                    torch.mm(grad, unembedding, out=grad_hidden[part])
                    grad_hidden[part] *= w
                if grad_unembedding is not None:
                    grad_unembedding.addmm_(grad.t(), h * w)
            else:  # where every rounding counts, there is one
                grad = grad.mul_(w).to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, unembedding, out=grad_hidden[part])
                if grad_unembedding is not None:
                    grad_unembedding += grad.t() @ h
            del log_probs, grad, towards
        ctx.save_for_backward(grad_hidden, grad_unembedding)
        ctx.unembedding_dtype = unembedding.dtype
        if teacher is None:
            return (loss,)
        distillation *= teacher.temperature**2
        parts = loss, distillation, agreement
        ctx.mark_non_differentiable(*parts)
        return loss + teacher.weight * distillation, *parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_unembedding = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).to(grad_hidden.dtype)
        if grad_unembedding is not None:
            grad_unembedding = (grad_unembedding * grad).to(ctx.unembedding_dtype)
        return grad_hidden, grad_unembedding, None, None, None, None


def _compare(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The student's log-probabilities against the teacher's logits, both `[C, V]`.

    Returns:
        `KL(teacher || student)` `[C, 1]` at the temperature; whether their argmax is the same, `[C, 1]`; and the difference of
        their distributions at the temperature, `[C, V]`: the KL's gradient, times the temperature.
    """
    agrees = student.argmax(dim=-1, keepdim=True) == teacher.argmax(dim=-1, keepdim=True)
    if temperature != 1:
        student, teacher = (student / temperature).log_softmax(dim=-1), teacher / temperature
    teacher = teacher.log_softmax(dim=-1)
    probs = teacher.exp()
    divergence = teacher.sub_(student).mul_(probs).sum(dim=-1, keepdim=True)
    return divergence, agrees, student.exp().sub_(probs)
