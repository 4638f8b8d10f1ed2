"""The interface between training and a teacher, in memory or recorded; and the end of distillation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lightning import Trainer
from torch import Tensor

from nlgmoe.batch import Batch
from nlgmoe.layers.losses import TeacherTargets
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.token_schedule import SequenceCurriculum, sequence_length
from nlgmoe.validation import SettingError


class Distiller(Protocol):
    """A source of teacher targets for `MoEGPTModule`.

    Attributes:
        loss_weight: factor of `beta`, from 1 to 0; `StagedDistillation` lowers it before a step.
    """

    loss_weight: float

    def start(self, student: GPT, trainer: Trainer) -> None:
        """Prepare for training, unless `loss_weight` is 0. A collective: all ranks call this.

        Raises:
            ValueError: the teacher is missing, damaged, or does not fit the run. Every rank raises.
        """
        ...

    def read(self, batch: Batch, mask: Tensor | None) -> TeacherTargets | None:
        """Return the targets of a batch, as the student reads it, with its token mask; None once distillation has ended."""
        ...

    def release(self) -> bool:
        """Free what `start` loaded. Returns whether there was anything."""
        ...


@runtime_checkable
class KeepsState(Protocol):
    """A distiller with state in the student's checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain data."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it, before `start`."""
        ...


class End(NamedTuple):
    """The end of training or distillation: no step begins at or after either number; None: no such end."""

    tokens: int | None
    steps: int | None

    def earlier(self, other: End) -> End:
        """Return the earlier end."""
        pairs = zip(self, other, strict=True)
        return End(*(min((n for n in pair if n is not None), default=None) for pair in pairs))


@runtime_checkable
class EndsDistillation(Protocol):
    """A callback that ends distillation."""

    def distillation_end(self, train_tokens: int | None) -> End:
        """Return the end, in a run of `train_tokens` tokens."""
        ...


def distillation_end(train_tokens: int | None, trainer: Trainer) -> End:
    """Return the end of distillation in a run of `train_tokens` tokens: the run's, or that of a callback of its trainer."""
    end = End(train_tokens, trainer.max_steps if trainer.max_steps >= 0 else None)
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, EndsDistillation):
            end = end.earlier(callback.distillation_end(train_tokens))
    return end


class RunPosition(NamedTuple):
    """The position of a run: tokens trained on, optimizer steps taken, samples consumed."""

    tokens: int = 0
    steps: int = 0
    samples: int = 0


def samples_before_end(
    end: End,
    batch_size_after: Callable[[int], int],
    seq_len: int,
    curriculum: SequenceCurriculum | None,
    begin: RunPosition = RunPosition(),  # noqa: B008 (immutable)
) -> int | None:
    """Return the samples consumed when a run ends, counted from its first; None if it has no end in tokens or steps.

    Args:
        end: of the run.
        batch_size_after: sequences of the step that follows that many samples, over all ranks.
        seq_len: length of whole sequences.
        curriculum: schedule of shorter sequences, each a cut sample; None: all are whole.
        begin: position to start from.
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
    """Check the settings of a distillation loss."""
    if not (math.isfinite(beta) and beta > 0):
        raise SettingError(f"beta={beta} must be above 0; model.distiller=null trains without a teacher")
    if not (math.isfinite(temperature) and temperature > 0):
        raise SettingError(f"temperature={temperature} must be above 0; 1.0 compares the distributions as they are")
