"""Schedules as pure functions of the tokens trained on (the token clock), not of steps.

The paper's runs warm up over 375M tokens and follow a cosine to the minimum over 260B or 300B tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nlgmoe.validation import SettingError, require, require_at_least, require_valid


@dataclass(frozen=True)
class LearningRateSchedule:
    """The learning rate over tokens.

    Attributes:
        shape: shape after the warm-up: `cosine` falls to `min_lr` at `decay_tokens` and stays there, `constant` stays at the
            peak, `wsd` (warm-up, stable, decay) stays at the peak and falls linearly over the last `cooldown_tokens`
            before `decay_tokens`.
        min_lr: learning rate at the end.
        warmup_tokens: the learning rate rises linearly from 0 over this many tokens.
        decay_tokens: tokens from the start of training to the end of the decay; not used by `constant`.
        cooldown_tokens: length of the decay of `wsd`, in tokens; used by `wsd` only.
    """

    shape: Literal["cosine", "constant", "wsd"] = "cosine"
    min_lr: float = 0.0
    warmup_tokens: int = 0
    decay_tokens: int | None = None
    cooldown_tokens: int | None = None

    def __post_init__(self) -> None:
        require_valid(self)
        require_at_least(0, self, "warmup_tokens", "min_lr")
        shape, warmup, decay, cooldown = self.shape, self.warmup_tokens, self.decay_tokens, self.cooldown_tokens
        require(
            (cooldown is not None) == (shape == "wsd"),
            f"cooldown_tokens={cooldown} does not fit shape={shape}; set it with shape=wsd, and only then",
        )
        if shape == "constant":
            require(
                decay is None and not self.min_lr,
                "shape=constant never decays; remove decay_tokens and min_lr, or use cosine or wsd",
            )
            return
        if decay is None or decay <= warmup:
            raise SettingError(f"shape={shape} needs decay_tokens={decay} to be above warmup_tokens={warmup}; set it")
        require(
            cooldown is None or 0 < cooldown <= decay - warmup,
            f"cooldown_tokens={cooldown} must be above 0 and fit between warmup_tokens={warmup} and decay_tokens={decay}",
        )


def learning_rate(tokens: int, peak: float, schedule: LearningRateSchedule) -> float:
    """Return the learning rate of the step after the first `tokens` tokens of training."""
    if tokens < schedule.warmup_tokens:
        return peak * tokens / schedule.warmup_tokens
    if schedule.shape == "constant":
        return peak
    assert schedule.decay_tokens is not None
    if tokens >= schedule.decay_tokens:
        return schedule.min_lr
    if schedule.shape == "wsd":
        assert schedule.cooldown_tokens is not None
        left = min(1.0, (schedule.decay_tokens - tokens) / schedule.cooldown_tokens)
        return schedule.min_lr + (peak - schedule.min_lr) * left
    done = (tokens - schedule.warmup_tokens) / (schedule.decay_tokens - schedule.warmup_tokens)
    return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class SequenceCurriculum:
    """Train on short sequences first: batches are truncated to a growing length; the remaining tokens are not trained on.

    Attributes:
        tokens: sequences have full length after this many tokens of training; until then their length grows linearly.
        start: length of the first sequences, in tokens; a multiple of `increment`.
        increment: the length is rounded down to a multiple of this many tokens; multiples of 8 are fast on GPUs.
    """

    tokens: int
    start: int = 80
    increment: int = 8

    def __post_init__(self) -> None:
        require_valid(self)
        require_at_least(1, self, "tokens", "start", "increment")
        if self.start % self.increment:
            below = self.start // self.increment * self.increment
            nearest = " or ".join(str(value) for value in (below, below + self.increment) if value)
            remedy = f"must be a multiple of increment={self.increment}: set it to {nearest}"
            raise SettingError(f"start={self.start} {remedy}")


def sequence_length(tokens: int, seq_len: int, curriculum: SequenceCurriculum) -> int:
    """Return the sequence length of the step after the first `tokens` tokens of training.

    DeepSpeed's `fixed_linear` schedule (`curriculum_scheduler.py`), on the token clock instead of a count of steps.

    Args:
        tokens: tokens trained on so far; a truncated sequence counts with its truncated length.
    """
    if tokens >= curriculum.tokens:
        return seq_len
    length = curriculum.start + tokens * (seq_len - curriculum.start) // curriculum.tokens
    return length - length % curriculum.increment


def distillation_weight(clock: int, end: int, ramp: int = 0) -> float:
    """Return the weight of the distillation loss after `clock` tokens (or steps): 1, at `end` 0, before it a linear `ramp`."""
    if clock >= end:
        return 0.0
    return min(1.0, (end - clock) / ramp) if ramp else 1.0
