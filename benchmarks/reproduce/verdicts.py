"""What the results say of each claim: a difference with its interval, and shown, not shown or contradicted.

A difference is tested by a paired t test at 5%; "as good as" by two one-sided tests with the margin that was fixed before the
runs. For a claim that is not shown, the effect that would have been found with a probability of 80% is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.reproduce.cells import BUDGETS, CLAIMS, GROWTH, MARGIN, SEEDS, SEEDS_EQUAL, TEACHER, WIDER, Cell
from nlgmoe.tools.statistics import PairedDifference, paired_difference

SHOWN, NOT_SHOWN, CONTRADICTED, NOT_RUN = "shown", "not shown", "contradicted", "not run"
DRAWS = 10_000  # of the bootstrap
Runs = dict[str, dict[str, Any]]


@dataclass
class Verdict:
    """The verdict on a claim.

    Attributes:
        number: of the claim.
        title: the claim.
        paper: what the paper found.
        verdict: `shown`, `not shown`, `contradicted` or `not run`.
        found: the numbers, in a sentence.
        rows: of the table, header first.
    """

    number: int
    title: str
    paper: str
    verdict: str = NOT_RUN
    found: str = ""
    rows: list[list[str]] = field(default_factory=list)


def runs_of_cell(runs: Runs, cell: Cell, seeds: tuple[int, ...] = SEEDS_EQUAL) -> list[dict[str, Any]]:
    """Return the runs of a cell, in the order of the seeds."""
    keys = (f"{cell.name}-seed{seed}" for seed in seeds)
    return [runs[key] for key in keys if key in runs]


def of_cell(runs: Runs, cell: Cell, fact: str = "val_loss", seeds: tuple[int, ...] = SEEDS_EQUAL) -> dict[int, float]:
    """Return a fact of the runs of a cell, by seed."""
    return {run["seed"]: run[fact] for run in runs_of_cell(runs, cell, seeds)}


def difference(runs: Runs, first: Cell, second: Cell) -> PairedDifference | None:
    """Return `first - second` in validation loss over the seeds of both; None if there are fewer than two."""
    a, b = of_cell(runs, first), of_cell(runs, second)
    seeds = sorted(a.keys() & b.keys())
    return paired_difference([a[s] for s in seeds], [b[s] for s in seeds]) if len(seeds) > 1 else None


def is_lower(found: PairedDifference | None) -> tuple[str, str]:
    """Return verdict and numbers of the claim that the first loss is lower; none before the pairs of all `SEEDS` are there."""
    if found is None or found.pairs < len(SEEDS):
        return NOT_RUN, ""
    low, high = found.interval()
    numbers = f"{found.mean:+.4f} ± {found.error:.4f} nats ({found.pairs} pairs, 95% {low:+.4f} to {high:+.4f})"
    if high < 0:
        return SHOWN, numbers
    if low > 0:
        return CONTRADICTED, numbers
    return NOT_SHOWN, f"{numbers}; a difference of {visible(found):.4f} would have been seen"


def is_equal(found: PairedDifference | None, pairs: int, or_lower: bool = False) -> tuple[str, str]:
    """Return verdict and numbers of the claim that both losses are equal within `MARGIN`; none before all `pairs` are there.

    Args:
        found: the difference.
        pairs: that were planned.
        or_lower: a first loss that is lower by more than the margin is as good too.
    """
    if found is None or found.pairs < pairs:
        return NOT_RUN, ""
    low, high = found.interval(0.9)
    numbers = f"{found.mean:+.4f} ± {found.error:.4f} nats ({found.pairs} pairs, 90% {low:+.4f} to {high:+.4f}, margin {MARGIN})"
    if found.smaller_than(MARGIN) or (or_lower and high < MARGIN):
        return SHOWN, numbers
    if low > MARGIN or (high < -MARGIN and not or_lower):
        return CONTRADICTED, numbers
    return NOT_SHOWN, f"{numbers}; a margin of {(high - low) / 2:.4f} would have been shown for equal means"


def visible(found: PairedDifference) -> float:
    """Return the difference that a two-sided test at 5% with these pairs finds with a probability of 80%."""
    freedom = found.pairs - 1
    return float(stats.t.ppf(0.975, freedom) + stats.t.ppf(0.8, freedom)) * found.error


def cost_at_equal_loss(runs: Runs, costs: dict[str, float]) -> tuple[float, float, float, float] | None:
    """Return how many times more a dense model of MoE-16's loss costs: estimate, 95% interval, and the largest that was trained.

    The dense losses are fitted by a straight line over log cost. The interval is a bootstrap over seeds.

    Args:
        runs: the results.
        costs: of a token of each configuration, in any unit.
    """
    cells = [Cell(name) for name in WIDER]
    dense, moe = [of_cell(runs, cell) for cell in cells], of_cell(runs, Cell("moe_16"))
    seeds = sorted(set(moe).intersection(*dense))
    if len(seeds) < 2:
        return None
    cost, own = np.log([costs[name] for name in WIDER]), math.log(costs["moe_16"])
    losses = np.array([[one[seed] for one in dense] for seed in seeds])  # [seeds, sizes]
    targets = np.array([moe[seed] for seed in seeds])

    def ratio(chosen: np.ndarray) -> float:
        slope, base = np.polyfit(cost, losses[chosen].mean(axis=0), 1)
        return float(np.exp((targets[chosen].mean() - base) / slope - own))

    everything = np.arange(len(seeds))
    draws = np.random.default_rng(0).integers(len(seeds), size=(DRAWS, len(seeds)))
    low, high = np.quantile([ratio(draw) for draw in draws], [0.025, 0.975])
    return ratio(everything), float(low), float(high), float(np.exp(cost[-1] - own))


def _more_experts(results: dict[str, Any], verdict: Verdict) -> None:
    runs = results["runs"]
    verdict.verdict, verdict.found = is_lower(difference(runs, Cell("moe_16"), Cell("dense")))
    verdict.rows = [["tokens", *GROWTH, "lowest"]]
    for budget in BUDGETS:
        found = {name: of_cell(runs, Cell(name, budget), seeds=SEEDS) for name in GROWTH}  # the same for all
        if all(found.values()):
            means = {name: float(np.mean(list(losses.values()))) for name, losses in found.items()}
            tokens = next(iter(of_cell(runs, Cell("dense", budget), "tokens").values()))
            verdict.rows.append(
                [f"{tokens / 1e6:.1f}M", *(f"{m:.4f}" for m in means.values()), min(means, key=means.__getitem__)]
            )


def _cheaper(results: dict[str, Any], verdict: Verdict) -> None:
    runs = results["runs"]
    flops = {name: of_cell(runs, Cell(name), "flops_per_token") for name in (*WIDER, "moe_16")}
    if not all(flops.values()):
        return
    costs = {"FLOPs": {name: next(iter(values.values())) for name, values in flops.items()}}
    if "speed" in results:
        costs["seconds"] = results["speed"]["step_seconds"]
    found = {name: cost_at_equal_loss(runs, cost) for name, cost in costs.items()}
    if None in found.values():
        return
    verdict.rows = _sizes(results, [*(Cell(name) for name in WIDER), Cell("moe_16")])
    ratio, low, high, largest = found["FLOPs"]  # type: ignore[misc]
    verdict.verdict = SHOWN if low > 2 else CONTRADICTED if high < 2 else NOT_SHOWN
    times = [f"{one[0]:.2f} times the {name} (95% {one[1]:.2f} to {one[2]:.2f})" for name, one in found.items() if one]
    verdict.found = f"{', '.join(times)}; the claim needs at least 2 times the FLOPs" + (
        f"; beyond the largest dense model, {largest:.1f}: extrapolated" if ratio > largest else ""
    )


def _as_good(results: dict[str, Any], verdict: Verdict) -> None:
    runs = results["runs"]
    verdict.verdict, verdict.found = is_equal(difference(runs, TEACHER, Cell("moe_32")), len(SEEDS_EQUAL))
    verdict.rows = _sizes(results, [Cell("moe_32"), TEACHER])


def _staged(results: dict[str, Any], verdict: Verdict) -> None:
    runs = results["runs"]
    verdict.rows = [
        ["budget", "none", "to the end", "staged", "staged - none", "staged - to the end", "staged - teacher"]
    ]
    verdicts: list[tuple[str, str]] = []
    for budget in BUDGETS:
        none, full, staged = (Cell("student", budget, how) for how in (None, "full", "staged"))
        pairs = [is_lower(difference(runs, staged, other)) for other in (none, full, TEACHER)]
        if NOT_RUN in (name for name, _ in pairs):
            continue
        means = [f"{np.mean(list(of_cell(runs, cell).values())):.4f}" for cell in (none, full, staged)]
        verdict.rows.append([f"{budget:g}", *means, *(numbers for _, numbers in pairs)])
        verdicts = pairs[:2] if budget == max(BUDGETS) else []
    if verdicts:
        names = {name for name, _ in verdicts}
        verdict.verdict = CONTRADICTED if CONTRADICTED in names else NOT_SHOWN if NOT_SHOWN in names else SHOWN
        verdict.found = f"staged - none: {verdicts[0][1]}; staged - to the end: {verdicts[1][1]}"


def _second_half(results: dict[str, Any], verdict: Verdict) -> None:
    runs = results["runs"]
    verdict.verdict, verdict.found = is_lower(difference(runs, Cell("second_half"), Cell("first_half")))
    verdict.rows = _sizes(results, [Cell("first_half"), Cell("second_half")])


def _residual(results: dict[str, Any], verdict: Verdict) -> None:
    runs = results["runs"]
    verdict.verdict, verdict.found = is_equal(difference(runs, Cell("residual"), Cell("top_2")), len(SEEDS_EQUAL))
    verdict.rows = _sizes(results, [Cell("top_2"), Cell("residual")])


def _smaller(results: dict[str, Any], verdict: Verdict) -> None:
    runs = results["runs"]
    student = Cell("student", 1.0, "staged")
    verdict.rows = _sizes(results, [Cell("moe_32"), TEACHER, student])
    found = [is_equal(difference(runs, cell, Cell("moe_32")), len(SEEDS), or_lower=True) for cell in (TEACHER, student)]
    names = [name for name, _ in found]
    if NOT_RUN not in names:
        verdict.verdict = CONTRADICTED if CONTRADICTED in names else NOT_SHOWN if NOT_SHOWN in names else SHOWN
        sizes = [
            next(iter(of_cell(runs, cell, "params_total").values())) for cell in (Cell("moe_32"), TEACHER, student)
        ]
        pr_moe, mos = (
            f"{sizes[0] / size:.1f} times smaller at {numbers}"
            for size, (_, numbers) in zip(sizes[1:], found, strict=True)
        )
        verdict.found = f"PR-MoE is {pr_moe}; with MoS it is {mos}"


def _capacity(results: dict[str, Any], verdict: Verdict) -> None:
    runs = results["runs"]
    verdict.verdict, verdict.found = is_equal(difference(runs, Cell("capacity"), Cell("moe_16")), len(SEEDS))
    verdict.rows = _sizes(results, [Cell("moe_16"), Cell("capacity")])


def _sizes(results: dict[str, Any], cells: list[Cell]) -> list[list[str]]:
    runs, seconds = results["runs"], results.get("speed", {}).get("step_seconds", {})
    rows = [["model", "parameters", "active", "tokens per active parameter", "FLOPs a token", "validation loss", "ms a step",
             "runs"]]  # fmt: skip
    for cell in cells:
        if own := runs_of_cell(runs, cell):
            losses = [run["val_loss"] for run in own]
            error = np.std(losses, ddof=1) / math.sqrt(len(own)) if len(own) > 1 else math.nan
            one, milliseconds = own[0], f"{1000 * seconds[cell.config]:.0f}" if cell.config in seconds else ""
            rows.append(
                [cell.name, f"{one['params_total'] / 1e6:.2f}M", f"{one['params_active'] / 1e6:.2f}M",
                 f"{one['tokens_per_active_parameter']:.1f}", f"{one['flops_per_token'] / 1e6:.2f}M",
                 f"{np.mean(losses):.4f} ± {error:.4f}", milliseconds, str(len(own))]
            )  # fmt: skip
    return rows if len(rows) > 1 else []


_JUDGES: dict[int, Callable[[dict[str, Any], Verdict], None]] = {
    1: _more_experts,
    2: _cheaper,
    3: _second_half,
    4: _residual,
    5: _as_good,
    6: _staged,
    7: _capacity,
    8: _smaller,
}


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """Judge every claim, in the order of the campaign."""
    found = [Verdict(claim.number, claim.title, claim.paper) for claim in CLAIMS]
    for verdict in found:
        _JUDGES[verdict.number](results, verdict)
    return found
