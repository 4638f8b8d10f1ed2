"""Rotary position embeddings (arXiv 2104.09864), and their scalings for texts longer than those of training.

    frequency_i = rope_theta^(-2i / R)                 i = 0 ... R / 2 - 1, radians per position
    angle       = position * frequency_i               values i and i + R / 2 of a head are rotated by it

Yarn     slow frequencies are divided by `factor`, fast ones are not, those between by a ramp of i        arXiv 2309.00071
Llama3   as Yarn, with a ramp of the frequency                                                            Llama 3.1

Letters: B sequences, T positions, N heads, D width of a head, of which the first R values are rotated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nlgmoe.device import to_device
from nlgmoe.parts import RotaryScaling
from nlgmoe.validation import require, require_at_least, require_valid


@dataclass(frozen=True)
class Yarn(RotaryScaling):
    """The scaling of YaRN, without its temperature, which is a value of `attention_scale`.

    Attributes:
        factor: multiple of `original_length` that texts may have; slow frequencies are divided by it.
        original_length: longest text of the first training, in tokens.
        beta_fast: turns in `original_length` tokens from which on a frequency is not changed.
        beta_slow: turns in `original_length` tokens up to which a frequency is divided by `factor`.
        truncate: the ramp begins and ends at whole pairs of values.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        _check(self)
        require(
            self.beta_fast > self.beta_slow > 0,
            f"beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}, and that above 0",
        )

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        pairs = len(frequencies)

        def pair_of(turns: float) -> float:
            """Return the index i of the frequency with so many turns in `original_length`."""
            return pairs * math.log(self.original_length / (2 * math.pi * turns)) / math.log(theta)

        first, last = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        width = last - first if last != first else 0.001  # as in the paper's code
        ramp = ((torch.arange(pairs, dtype=torch.float32, device="cpu") - first) / width).clamp(0, 1)  # [R / 2]
        return frequencies / self.factor * ramp + frequencies * (1 - ramp)


@dataclass(frozen=True)
class Llama3(RotaryScaling):
    """The scaling of Llama 3.1.

    Attributes:
        factor: multiple of `original_length` that texts may have; slow frequencies are divided by it.
        original_length: longest text of the first training, in tokens.
        low_freq_factor: turns in `original_length` tokens up to which a frequency is divided by `factor`.
        high_freq_factor: turns in `original_length` tokens from which on a frequency is not changed.
    """

    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _check(self)
        require(
            self.high_freq_factor > self.low_freq_factor > 0,
            f"high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}, and that above 0",
        )

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        turns = self.original_length / (2 * math.pi / frequencies)  # [R / 2], in `original_length`
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - keep) * frequencies / self.factor + keep * frequencies


def _check(scaling: Yarn | Llama3) -> None:
    require_valid(scaling)
    require_at_least(1, scaling, "factor", "original_length")


def rotations(
    positions: Tensor, size: int, theta: float, scaling: RotaryScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the angles of `positions` `[1 or B, T]`, each `[1 or B, 1, T, R]` in fp32; R is `size`."""
    # [R / 2], on the CPU: a difference in the last bit of a frequency rotates position 4,096 by 2e-4.
    frequencies = 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size))
    if scaling is not None:
        frequencies = scaling.scale(frequencies, theta)
    angles = positions[:, None, :, None].float() * to_device(frequencies, positions.device)  # [1 or B, 1, T, R / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of values (i, i + R / 2) of each head, `[B, N, T, D]`; values from R on stay.

    The result of a partial rotation is laid out as `[B, T, N, D]`, as `x` is after a projection.
    """
    size = cos.shape[-1]
    if size < x.shape[-1]:
        parts = rotate(x[..., :size], cos, sin), x[..., size:]
        return torch.cat([part.transpose(1, 2) for part in parts], dim=-1).transpose(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)
