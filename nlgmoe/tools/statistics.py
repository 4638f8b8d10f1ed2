"""Differences between two models in pairs of runs, one pair for each seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the differences within pairs, and its standard error.

    A seed fixes the order of the data and the initial dense weights of both models, so what varies in both alike cancels.

    Attributes:
        mean: over pairs.
        error: standard error of the mean; NaN for one pair.
        pairs: number of pairs.
    """

    mean: float
    error: float
    pairs: int

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the confidence interval of the mean, by Student's t; infinite for one pair."""
        if self.pairs < 2:
            return -math.inf, math.inf
        half = float(stats.t.ppf((1 + confidence) / 2, self.pairs - 1)) * self.error
        return self.mean - half, self.mean + half


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Compute `first - second` pair by pair.

    Args:
        first: a value for each seed.
        second: the other model's, of the same seeds in the same order.
    """
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    pairs = len(differences)
    error = float(differences.std(ddof=1) / math.sqrt(pairs)) if pairs > 1 else math.nan
    return PairedDifference(float(differences.mean()), error, pairs)
