"""The interface between training and a teacher, in memory or recorded; and the end of distillation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from lightning import Trainer
from torch import Tensor

from nlgmoe.batch import Batch
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.run_checkpoints import find_checkpoint
from nlgmoe.checkpoint.verify import hash_of_weights
from nlgmoe.layers.losses import TeacherTargets
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.token_schedule import SequenceCurriculum, sequence_length
from nlgmoe.validation import RunError, error_type_like, require


class Distiller(ABC):
    """A source of teacher targets for `MoEGPTModule`.

    Args:
        beta: weight of the distillation loss.
        temperature: divides the logits of both models before the KL divergence.
    """

    def __init__(self, beta: float, temperature: float) -> None:
        remedy = "; model.distiller=null trains without a teacher"
        require(0 < beta < math.inf, f"beta={beta} must be above 0{remedy}")
        remedy = "; 1.0 compares the distributions as they are"
        require(0 < temperature < math.inf, f"temperature={temperature} must be above 0{remedy}")
        self.beta, self.temperature = beta, temperature
        self.loss_weight = 1.0  # factor of `beta`, from 1 to 0; `StagedDistillation` lowers it before a step
        self._used: dict[str, Any] = {}  # `setting`, `checkpoint` and `weights` of the teacher, also in the resumed run

    @abstractmethod
    def start(self, student: GPT, trainer: Trainer) -> None:
        """Prepare for training, unless `loss_weight` is 0. A collective: all ranks call this, and raise if one does.

        The trainer has the student's data; its strategy may distribute the teacher's experts over ranks.
        """

    @abstractmethod
    def read(self, batch: Batch, mask: Tensor | None) -> TeacherTargets | None:
        """Return the teacher's targets for a batch; None once distillation has ended."""

    @abstractmethod
    def release(self) -> bool:
        """Free what `start` loaded. Returns whether anything was loaded."""

    def pin_teacher(self, name: str, value: str, checkpoint: str, weights: str) -> None:
        """Note the teacher of the setting `name`; a resumed run's must have the same weights, unless the value is another one."""
        used = self._used
        if used.get("setting") == value and used["weights"] != weights:
            raise RunError(
                f"model.distiller.{name}={value}: this run has learned from {used['checkpoint']}, and the weights are others "
                "now; restore them, or give another path to change the teacher"
            )
        self._used = {"setting": value, "checkpoint": checkpoint, "weights": weights}

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher that the run has used, for the student's checkpoint."""
        return self._used

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state before `start`; the teacher is kept unless the setting that names it has changed."""
        self._used = state_dict


def find_teacher(teacher: str, remedy: str) -> tuple[Checkpoint, str]:
    """Return a teacher's checkpoint, of a run the newest valid one, and the hash of its weights. A collective."""
    try:
        checkpoint = find_checkpoint(teacher)
        return checkpoint, hash_of_weights(checkpoint)
    except (ValueError, OSError) as error:
        raise error_type_like(error)(f"model.distiller.teacher={teacher}: {error}; {remedy}") from error


class End(NamedTuple):
    """The end of training or distillation: no step begins at or after either number; None: no such end."""

    tokens: int | None
    steps: int | None

    def earlier(self, other: End) -> End:
        """Return the earlier end."""
        pairs = zip(self, other, strict=True)
        return End(*(min((n for n in pair if n is not None), default=None) for pair in pairs))


def distillation_end(train_tokens: int | None, trainer: Trainer) -> End:
    """Return the end of distillation in a run of `train_tokens` tokens: the earliest of the run's and its callbacks'."""
    end = End(train_tokens, trainer.max_steps if trainer.max_steps >= 0 else None)
    for callback in getattr(trainer, "callbacks", []):
        if hasattr(callback, "distillation_end"):
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

    `batch_size_after` returns the sequences of the step that follows that many samples, over all ranks.
    """
    if end == End(None, None):
        return None
    tokens, steps, samples = begin
    while (end.tokens is None or tokens < end.tokens) and (end.steps is None or steps < end.steps):
        length = seq_len if curriculum is None else sequence_length(tokens, seq_len, curriculum)
        size = batch_size_after(samples)
        tokens, steps, samples = tokens + size * length, steps + 1, samples + size
    return samples
