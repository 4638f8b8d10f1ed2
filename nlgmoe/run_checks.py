"""Checks of a run: lengths and tokenizer before the first step, and ends that come too early or too late."""

from __future__ import annotations

import math
import sys

from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities import rank_zero_warn

from nlgmoe.config import GPTConfig
from nlgmoe.data.training_data import TrainingData, training_data
from nlgmoe.distill.distiller import End
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from nlgmoe.validation import SettingError, require


def check_vocabulary(config: GPTConfig, data: TrainingData) -> None:
    """Check that the model's vocabulary covers the token ids of the data."""
    if data.vocab_size > config.vocab_size:
        raise SettingError(
            f"the data's tokenizer has {data.vocab_size} ids but model.config.vocab_size is {config.vocab_size}; "
            f"set it to {data.vocab_size}, or data.tokenizer to the model's"
        )


def check_lengths(config: GPTConfig, seq_len: int, curriculum: SequenceCurriculum | None) -> None:
    """Check that the model reads sequences as long as the data's, `seq_len` tokens, and that a curriculum begins below that."""
    require(
        seq_len <= config.seq_len,
        f"data.seq_len={seq_len} is above model.config.seq_len={config.seq_len}, the longest sequence that the model reads; "
        "lower it, or raise model.config.seq_len",
    )
    require(
        curriculum is None or curriculum.start <= seq_len,
        f"model.curriculum.start={curriculum.start if curriculum else None} is above data.seq_len={seq_len}; lower it",
    )


def warn_about_end(
    seq_len: int,
    curriculum: SequenceCurriculum | None,
    schedule: LearningRateSchedule,
    train_tokens: int | None,
    trainer: Trainer,
) -> None:
    """Warn if training has no end, or ends before curriculum or schedule, or the first sample of a part of a blend."""
    stoppers = (Timer, EarlyStopping)
    stopped = any(isinstance(callback, stoppers) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if train_tokens is None and trainer.max_steps < 0 and trainer.max_epochs in (None, -1) and not stopped:
        rank_zero_warn(
            "this run has no end; set model.train_tokens, trainer.max_steps or trainer.max_time, or stop it with Ctrl+C"
        )
    if curriculum is not None and train_tokens is not None and curriculum.tokens > train_tokens:
        rank_zero_warn(
            f"model.curriculum.tokens={curriculum.tokens} is above model.train_tokens={train_tokens}: training "
            f"ends before its sequences are {seq_len} tokens long; lower it"
        )
    if train_tokens is not None and schedule.decay_tokens is not None and train_tokens < schedule.decay_tokens:
        rank_zero_warn(
            f"model.train_tokens={train_tokens} is below model.schedule.decay_tokens={schedule.decay_tokens}: the learning rate "
            f"does not fall to its end; set decay_tokens, and warmup_tokens={schedule.warmup_tokens}, for this length"
        )
    data = training_data(trainer)
    if data is None or data.domain_shares is None:
        return
    shortest = seq_len if curriculum is None else curriculum.start
    ends = [] if train_tokens is None else [train_tokens / shortest]
    ends += [trainer.max_steps * data.batch_size_after(sys.maxsize)] if trainer.max_steps >= 0 else []
    for domain, share in zip(data.domains, data.domain_shares, strict=True):
        if share * min(ends, default=math.inf) < 1:
            rank_zero_warn(
                f"{domain} has {share:.2g} of the samples, less than one in the {min(ends):,.0f} of this run; raise the "
                "weight of its part, or remove the part"
            )


def warn_about_distillation(
    end: End, config: GPTConfig, curriculum: SequenceCurriculum | None, train_tokens: int | None, trainer: Trainer
) -> None:
    """Warn if training ends before distillation does, so that no step is on text alone.

    Args:
        end: end of distillation.
        config: the model's.
        curriculum: schedule of shorter sequences.
        train_tokens: tokens at which training ends.
        trainer: the run's, with its `max_steps` and its data.
    """
    steps = float(trainer.max_steps if trainer.max_steps >= 0 else math.inf)
    tokens = float(math.inf if train_tokens is None else train_tokens)
    if (data := training_data(trainer)) is not None:  # the most tokens and steps that the run can have
        shortest = config.seq_len if curriculum is None else curriculum.start
        most = steps * data.batch_size_after(sys.maxsize) * config.seq_len
        steps = min(steps, tokens / (data.batch_size_after(0) * shortest) + 1)
        tokens = min(tokens, most)
    late = (end.tokens is not None and end.tokens > tokens) or (end.steps is not None and end.steps > steps)
    if late:
        place = f"{end.steps:,} steps" if end.tokens is None else f"{end.tokens:,} tokens"
        rank_zero_warn(
            f"distillation ends after {place}, and the run before that, by model.train_tokens={train_tokens} or "
            f"trainer.max_steps={trainer.max_steps}: no step is on text alone; lower the end of StagedDistillation, or remove it"
        )


def warn_about_rate(schedule: LearningRateSchedule, tokens: int, train_tokens: int | None) -> None:
    """Warn if training has ended, by `max_steps`, `max_time` or a callback, before the learning rate has fallen to its end.

    Args:
        schedule: the learning rate over tokens.
        tokens: tokens that the run has trained on.
        train_tokens: tokens at which it ends; `warn_about_end` has warned of too few.
    """
    warned = train_tokens is not None and schedule.decay_tokens is not None and train_tokens < schedule.decay_tokens
    if schedule.decay_tokens is not None and tokens < schedule.decay_tokens and not warned:
        rank_zero_warn(
            f"training has ended after {tokens} tokens, and the learning rate falls until model.schedule.decay_tokens="
            f"{schedule.decay_tokens}: the final loss is that of a high learning rate; set decay_tokens for a run of this length"
        )
