"""The seam between training and what a student learns from beside the text: a teacher in memory, or what one said on disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from lightning import Trainer
from torch import Tensor

from nlgmoe.batch import Batch
from nlgmoe.layers.losses import Targets
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.token_schedule import SequenceCurriculum, sequence_length


class Distiller(Protocol):
    """What `MoEGPTModule` asks about its batches.

    Attributes:
        stage: of the distillation loss's weight, from 1 to 0; `StagedDistillation` lowers it before a step.
    """

    stage: float

    def start(self, student: GPT, trainer: Trainer) -> None:
        """Get ready for training, unless the lesson is over. Where there are ranks, all have to call this.

        Raises:
            ValueError: what there is to learn from is missing, damaged, or does not suit the run. Every rank raises.
        """
        ...

    def read(self, batch: Batch, mask: Tensor | None) -> Targets | None:
        """What to learn about a batch, as the student sees it, with its token mask; None if the lesson is over."""
        ...

    def release(self) -> bool:
        """Free what `start` took; whether there was anything."""
        ...


class End(NamedTuple):
    """The first step that begins at or after either is not taken, or not distilled; None: no such end."""

    tokens: int | None
    steps: int | None

    def earlier(self, other: End) -> End:
        """Whichever comes first."""
        pairs = zip(self, other, strict=True)
        return End(*(min((n for n in pair if n is not None), default=None) for pair in pairs))


@runtime_checkable
class EndsDistillation(Protocol):
    """A callback that ends distillation."""

    def distillation_end(self, train_tokens: int | None) -> End:
        """When, in a run of so many tokens."""
        ...


def last_of(train_tokens: int | None, trainer: Trainer) -> End:
    """When distillation ends in a run of so many tokens: with the run, or where a callback of its trainer says so."""
    end = End(train_tokens, trainer.max_steps if trainer.max_steps >= 0 else None)
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, EndsDistillation):
            end = end.earlier(callback.distillation_end(train_tokens))
    return end


class Clocks(NamedTuple):
    """How far a run is: tokens fed, optimizer steps taken, and samples that these took."""

    tokens: int = 0
    steps: int = 0
    samples: int = 0


def samples_until(
    end: End,
    batch_size_after: Callable[[int], int],
    seq_len: int,
    curriculum: SequenceCurriculum | None,
    begin: Clocks = Clocks(),  # noqa: B008 (immutable)
) -> int | None:
    """Samples that a run has taken when it ends, counted from its first one; None if it has no end in tokens or steps.

    Args:
        end: of the run.
        batch_size_after: sequences of the step that follows so many samples, over all ranks.
        seq_len: length of whole sequences.
        curriculum: shorter ones at first; the samples are as many, cut.
        begin: where it stands.
    """
    if end == End(None, None):
        return None
    tokens, steps, samples = begin
    while (end.tokens is None or tokens < end.tokens) and (end.steps is None or steps < end.steps):
        length = seq_len if curriculum is None else sequence_length(tokens, seq_len, curriculum)
        size = batch_size_after(samples)
        tokens, steps, samples = tokens + size * length, steps + 1, samples + size
    return samples


def check_loss(beta: float, temperature: float) -> None:
    """Check the settings of a distillation loss.

    Raises:
        ValueError: one is not above 0.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta={beta} must be above 0; model.distiller=null trains without a teacher")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be above 0; 1.0 compares the distributions as they are")
