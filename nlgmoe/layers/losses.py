"""Cross-entropy from hidden states, with or without a teacher, in chunks of tokens: a batch's logits never exist at once.

Letters: N tokens, H hidden size, V vocabulary, P rows of the padded table, C tokens of a chunk, K classes that a teacher's
distribution was cut to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nlgmoe.layers.precision import cast_by_autocast


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's whole distributions for the tokens of a batch."""

    logits: Callable[[slice], Tensor]  # maps a slice of tokens to their logits, `[C, V]`, without gradient
    weight: float  # weight of the distillation loss
    temperature: float  # divisor of both models' logits

    def compare(self, student: Tensor, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Compare the student's log-probabilities of a slice of tokens, `[C, V]`, with the teacher's.

        Returns `KL(teacher || student)` `[C, 1]` at the temperature; whether their argmax is the same, `[C, 1]`; and the
        difference of their distributions at the temperature, `[C, V]`: the KL's gradient, times the temperature.
        """
        teacher = self.logits(chunk).to(student.dtype)
        agrees = student.argmax(dim=-1, keepdim=True) == teacher.argmax(dim=-1, keepdim=True)
        if self.temperature != 1:
            student, teacher = (student / self.temperature).log_softmax(dim=-1), teacher / self.temperature
        teacher = teacher.log_softmax(dim=-1)
        probs = teacher.exp()
        divergence = teacher.sub_(student).mul_(probs).sum(dim=-1, keepdim=True)
        return divergence, agrees, student.exp().sub_(probs)


@dataclass(frozen=True)
class TopTargets:
    """A teacher's K likeliest tokens for each token of a batch; all others are one class, the tail.

    The divergence is that of distributions over K + 1 classes. It is at most the divergence over all tokens; the difference
    is the tail's mass times the divergence within the tail. Its gradient leaves the odds within the tail as the student has
    them; it differs from that of the whole distributions by at most twice the tail's mass, summed over the vocabulary
    (docs/distillation.md).
    """

    # Maps a slice of tokens to int64 `[C, K]`, the likeliest tokens at the temperature, the likeliest first; and
    # `[C, K + 1]`, their log-probabilities and the tail's, up to a constant: they are normalised here.
    top: Callable[[slice], tuple[Tensor, Tensor]]
    weight: float  # weight of the distillation loss
    temperature: float  # divisor of both models' logits; already applied to the teacher's

    def compare(self, student: Tensor, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        """See `SoftTargets.compare`."""
        ids, teacher = self.top(chunk)
        agrees = student.argmax(dim=-1, keepdim=True) == ids[:, :1]
        if self.temperature != 1:
            student = (student / self.temperature).log_softmax(dim=-1)
        limits = torch.finfo(student.dtype)
        # An empty tail has log-probability -inf; 0 times the lowest finite number is 0.
        teacher = teacher.to(student.dtype).log_softmax(dim=-1).clamp_min(limits.min)  # [C, K + 1]
        probs = teacher.exp()
        picked = student.gather(1, ids)  # [C, K]
        difference = student.exp().scatter_(1, ids, 0)  # the tail's, summed directly, without cancellation
        tail = difference.sum(dim=-1, keepdim=True).clamp_min(limits.tiny)  # [C, 1]
        divergence = (teacher - torch.cat([picked, tail.log()], dim=1)).mul_(probs).sum(dim=-1, keepdim=True)
        difference.mul_(1 - probs[:, -1:] / tail).scatter_(1, ids, picked.exp() - probs[:, :-1])
        return divergence, agrees, difference


TeacherTargets = SoftTargets | TopTargets


class DistilledLoss(NamedTuple):
    """A loss and its terms, scalars in at least fp32; only `loss` has a gradient."""

    loss: Tensor  # `language + weight * distillation`
    language: Tensor  # the cross-entropy
    distillation: Tensor  # `temperature^2 * KL(teacher || student)` of the distributions at the temperature
    agreement: Tensor  # share of the tokens whose likeliest target is the same for both


def cross_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    vocab_size: int,
    targets: Tensor,
    mask: Tensor | None,
    chunk_size: int,
    divisor: Tensor | None = None,
) -> Tensor:
    """Compute the mean over unmasked tokens of `-log softmax(hidden @ unembedding.T)[target]`, in at least fp32.

    The logits of `chunk_size` tokens exist at a time. The forward pass also computes their gradient, up to the scale from
    the backward pass, so that no logits are recomputed. Under autocast the GEMMs run in its dtype.

    Args:
        hidden: `[N, H]`.
        unembedding: `[P, H]`, P at least `vocab_size`; the rows from `vocab_size` on are padding that aligns the products'
            rows: they have no probability and no gradient.
        vocab_size: V.
        targets: `[N]` int64, below `vocab_size`.
        mask: `[N]` bool, False where a token is left out; None: none is.
        chunk_size: tokens per chunk; memory is `chunk_size * P` values.
        divisor: scalar divisor of the sum over unmasked tokens; None: their number. With the mean of all ranks'
            numbers, the mean of the ranks' losses is the loss of all their tokens.

    Returns a scalar; 0 if the mask is empty.
    """
    counted, factor = _weights(hidden, targets, mask, divisor)
    inputs = hidden, unembedding, vocab_size, targets, counted, factor, chunk_size
    loss: Tensor = _ChunkedCrossEntropy.apply(*inputs, None)[0]
    return loss


def distilled_cross_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    vocab_size: int,
    targets: Tensor,
    mask: Tensor | None,
    chunk_size: int,
    divisor: Tensor | None,
    teacher: TeacherTargets,
) -> DistilledLoss:
    """Compute `cross_entropy` and the distillation loss, over the same tokens and with the same divisor.

    Arguments as in `cross_entropy`. The teacher's logits too exist for `chunk_size` tokens at a time.
    """
    counted, factor = _weights(hidden, targets, mask, divisor)
    inputs = hidden, unembedding, vocab_size, targets, counted, factor, chunk_size
    return DistilledLoss(*_ChunkedCrossEntropy.apply(*inputs, teacher))


def _weights(hidden: Tensor, targets: Tensor, mask: Tensor | None, divisor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return 0 or 1 for each token, `[N]`, and the factor of the sum over tokens, a scalar; at least fp32."""
    counted = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    counted = counted.to(torch.promote_types(hidden.dtype, torch.float32))
    divisor = counted.sum() if divisor is None else divisor.to(counted.dtype)
    return counted, divisor.clamp_min(torch.finfo(counted.dtype).eps).reciprocal()


def padded_logits(hidden: Tensor, unembedding: Tensor, vocab_size: int) -> Tensor:
    """Return `hidden @ unembedding.T` in at least fp32, `[C, P]`; -inf from column `vocab_size` on."""
    logits = (hidden @ unembedding.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    logits[:, vocab_size:] = -torch.inf
    return logits


def token_losses(hidden: Tensor, unembedding: Tensor, vocab_size: int, targets: Tensor, chunk_size: int) -> Tensor:
    """Return the cross-entropy of each token, `[N]`, in at least fp32 and without gradient; for evaluation."""
    with torch.no_grad():
        hidden, unembedding = _for_product(hidden, unembedding)
        return torch.cat(
            [
                F.cross_entropy(padded_logits(h, unembedding, vocab_size), t, reduction="none")
                for h, t in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
            ]
        )


def _for_product(hidden: Tensor, unembedding: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to autocast's dtype, if any, or to that of `hidden`: once, where autocast would cast for every chunk."""
    hidden = cast_by_autocast(hidden)
    return hidden, unembedding.to(hidden.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients of `factor * sum_n counted_n * CE_n`, chunk by chunk; with a teacher also of what `DistilledLoss` adds.

    The 16-bit factors of the gradients' products hold probabilities and the mask. The backward pass multiplies the products'
    results in fp32 by `factor`, about 1 / N, and by the incoming gradient, which contains fp16's loss scale: in fp16 a
    probability times 1 / N rounds to 0, which no loss scale can undo.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        unembedding: Tensor,
        vocab_size: int,
        targets: Tensor,
        counted: Tensor,
        factor: Tensor,
        chunk_size: int,
        teacher: TeacherTargets | None,
    ) -> tuple[Tensor, ...]:
        ctx.dtypes = hidden.dtype, unembedding.dtype
        hidden, unembedding = _for_product(hidden, unembedding)
        (needs_hidden, needs_unembedding), dtype = ctx.needs_input_grad[:2], counted.dtype
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_unembedding = torch.zeros_like(unembedding, dtype=dtype) if needs_unembedding else None
        loss = hidden.new_zeros((), dtype=dtype)
        distillation, agreement = torch.zeros_like(loss), torch.zeros_like(loss)
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            h, target, unmasked = hidden[chunk], targets[chunk, None], counted[chunk, None]  # [C, H], [C, 1], [C, 1]
            logits = padded_logits(h, unembedding, vocab_size)
            probs = logits.softmax(dim=-1)  # [C, P]; two such exist at a time, never three; five with a teacher
            # log softmax(z) = z - max z + log max p: one exponential of all logits, where log_softmax and exp take two.
            largest, likeliest = logits.amax(dim=-1, keepdim=True), probs.amax(dim=-1, keepdim=True).log()  # [C, 1]
            picked = logits.gather(1, target) - largest + likeliest  # [C, 1]
            difference = None
            if teacher is not None:
                del probs  # frees memory for tensors of the same size
                log_probs = logits.sub_(largest).add_(likeliest)
                divergence, agrees, difference = teacher.compare(log_probs[:, :vocab_size], chunk)
                probs = log_probs.exp_()
                del log_probs
                distillation += (unmasked * divergence).sum()
                agreement += (unmasked * agrees).sum()
            del logits
            loss -= (unmasked * picked).sum()
            if not (needs_hidden or needs_unembedding):
                continue
            grad = probs.scatter_(1, target, picked.expm1())  # d loss / d logits: probs - onehot
            if teacher is not None and difference is not None:
                grad[:, :vocab_size].add_(difference, alpha=teacher.weight * teacher.temperature)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:  # the mask, 0 or 1, multiplies the narrower factor of each product
                torch.mm(grad, unembedding, out=grad_hidden[chunk])
                grad_hidden[chunk] *= unmasked
            if grad_unembedding is not None:
                h = h * unmasked.to(h.dtype)
                if hidden.dtype == dtype:
                    grad_unembedding.addmm_(grad.t(), h)
                else:
                    grad_unembedding += grad.t() @ h
            del probs, grad, difference
        ctx.save_for_backward(grad_hidden, grad_unembedding, factor)
        loss *= factor
        if teacher is None:
            return (loss,)
        terms = loss, distillation.mul_(factor * teacher.temperature**2), agreement * factor
        ctx.mark_non_differentiable(*terms)
        return loss + teacher.weight * distillation, *terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *sums, factor = ctx.saved_tensors
        scaled = (  # not in place: a second backward pass may follow
            None if total is None else (total.to(factor.dtype) * (grad * factor)).to(dtype)
            for total, dtype in zip(sums, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None, None, None
