"""The rule of the verdicts. It was committed before any candidate was trained.

`worse` was moved before `as good as` before any candidate was trained beside the strong baseline; no verdict of then changed.

d = loss of the candidate - loss of the baseline, final validation losses in nats per token, one pair for each seed. Its intervals
are Student's (`nlgmoe.tools.report.groups`, as for the claims). The first line that holds is the verdict:

    better       the 95% interval lies below 0
    worse        the 95% interval lies above 0
    as good as   the upper end of the 90% interval lies below 0.02 nats: a one-sided test at 5% of being worse by the margin
    unresolved   otherwise

With fewer than `PLANNED_PAIRS` pairs only `worse` and `unresolved` are said. No verdict is corrected for the number of rows.

The losses are compared at equal cost: at equal tokens, FLOPs and seconds. Of two models with different costs a token the costlier
one is judged after fewer tokens, `whole / ratio`; costs that differ by at most `SAME_COST` count as equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.reproduce.cells import MARGIN
from nlgmoe.tools.report.groups import PairedDifference, paired_difference

PLANNED_PAIRS, TUNING_SEED = 8, 9
COSTS = ("flops", "seconds")
SAME_COST = 0.02
BETTER, AS_GOOD, WORSE, UNRESOLVED = "better", "as good as", "worse", "unresolved"
CHANCE = 0.025  # of each row to be called better although it is equal


def reading(difference: PairedDifference) -> str:
    """Return the verdict on a difference."""
    low, high = difference.interval()
    complete = difference.pairs >= PLANNED_PAIRS
    if complete and high < 0:
        return BETTER
    if low > 0:
        return WORSE
    return AS_GOOD if complete and difference.interval(0.90)[1] < MARGIN else UNRESOLVED


def verdict(candidate: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Judge final losses of the same seeds in the same order.

    Returns:
        `reading`; `mean`, `low` and `high` of the difference with its 95% interval, in nats; `pairs`; and `resolution`, half of
        the interval: a mean difference below it could not have been told from 0.
    """
    difference = paired_difference(candidate, baseline)
    low, high = difference.interval() if difference.pairs > 1 else (None, None)
    half = None if high is None else high - difference.mean
    return {
        "reading": reading(difference),
        "mean": difference.mean,
        "low": low,
        "high": high,
        "pairs": difference.pairs,
        "resolution": half,
    }


def in_words(judged: dict[str, Any]) -> str:
    """Return a verdict with its numbers in a line."""
    within = f" (within {MARGIN} nats)" if judged["reading"] == AS_GOOD else ""
    words = f"{judged['reading']}{within}: {judged['mean']:+.4f} nats"
    if judged["low"] is None:
        return f"{words}, 1 pair, no interval"
    interval = f"({judged['low']:+.4f} to {judged['high']:+.4f}), {judged['pairs']} pairs"
    return f"{words} {interval}; a difference below {judged['resolution']:.4f} would not have shown"


def seeds_of(pairs: int) -> list[int]:
    """Return the seeds of the pairs, without that of the search for a learning rate."""
    return [seed for seed in range(1, pairs + 2) if seed != TUNING_SEED][:pairs]


def steps_of(costs: Mapping[str, Any], whole: int) -> dict[str, tuple[int, int]]:
    """Return the steps of candidate and baseline at equal tokens, FLOPs and seconds; `costs` are multiples of the baseline's."""
    return {"tokens": (whole, whole)} | {kind: steps_at_equal_cost(costs[kind], whole) for kind in COSTS}


def steps_at_equal_cost(ratio: float, whole: int) -> tuple[int, int]:
    """Return the steps of candidate and baseline at equal cost.

    Args:
        ratio: cost of a step of the candidate, as a multiple of the baseline's.
        whole: steps of a whole run.
    """
    if abs(ratio - 1) <= SAME_COST:
        return whole, whole
    return (round(whole / ratio), whole) if ratio > 1 else (whole, round(whole * ratio))
