"""Answers to the questions: a difference with its interval, the number of pairs, and a reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.reproduce.cells import CONTROL, SEEDS, TEACHER, WIDER, Cell
from benchmarks.reproduce.questions import (
    AGREES,
    DIFFERS,
    LARGER,
    QUESTIONS,
    STAGED_STUDENT,
    UNTESTABLE,
    Question,
    readings,
)
from nlgmoe.tools.report.groups import PairedDifference, paired_difference

Runs = dict[str, dict[str, Any]]
MAX_SEED = max(question.pairs for question in QUESTIONS)
MISSING = "pairs missing"
OTHER_PAIRS = (
    ("Staged student - MoE-32", STAGED_STUDENT, Cell("moe_32")),
    ("Staged student - its teacher", STAGED_STUDENT, TEACHER),
    ("Staged student - the student alone on twice the tokens", STAGED_STUDENT, CONTROL),
    ("MoE-4 - dense", Cell("moe_4"), Cell("dense")),
    ("MoE-32 - MoE-16", Cell("moe_32"), Cell("moe_16")),
    ("PR-MoE - MoE-16", TEACHER, Cell("moe_16")),
)


@dataclass(frozen=True)
class Answer:
    """The answer to a question, as the page prints it.

    Attributes:
        title: the question.
        paper: what the paper says.
        difference: with its 95% interval, as text.
        pairs: those that were trained, of those that were planned.
        reading: one of the readings of `questions`, or `MISSING`.
    """

    title: str
    paper: str
    difference: str
    pairs: str
    reading: str


def of_cell(runs: Runs, cell: Cell, fact: str = "val_loss", seeds: tuple[int, ...] | None = None) -> dict[int, float]:
    """Return a fact of the runs of a cell, by seed; None: of all seeds."""
    of_seeds = ((seed, runs.get(f"{cell.name}-seed{seed}")) for seed in seeds or range(1, MAX_SEED + 1))
    return {seed: run[fact] for seed, run in of_seeds if run is not None}


def difference(runs: Runs, first: Cell, second: Cell, pairs: int = MAX_SEED) -> PairedDifference | None:
    """Return `first - second` in validation loss over seeds up to `pairs` of both; None if there are fewer than two."""
    a, b = of_cell(runs, first), of_cell(runs, second)
    seeds = [seed for seed in range(1, pairs + 1) if seed in a and seed in b]
    return paired_difference([a[s] for s in seeds], [b[s] for s in seeds]) if len(seeds) > 1 else None


def with_interval(paired: PairedDifference) -> str:
    """Return a difference with its 95% interval."""
    low, high = paired.interval()
    return f"{paired.mean:+.3f} nats ({low:+.3f} to {high:+.3f})"


def answers(results: dict[str, Any]) -> dict[str, Answer]:
    """Answer every question, by key, in the order of the page."""
    runs = results["runs"]
    answered = answers_to(QUESTIONS, runs)
    return {"experts": answered.pop("experts"), "cheaper": _cheaper(results), **answered, "faster": _faster(results)}


def answers_to(questions: Sequence[Question], runs: Runs) -> dict[str, Answer]:
    """Answer questions that share one correction."""
    differences = [
        (question, difference(runs, question.first, question.second, question.pairs)) for question in questions
    ]
    read = readings(differences)
    return {question.key: _answer(question, paired, read) for question, paired in differences}


def _answer(question: Question, paired: PairedDifference | None, read: dict[str, str]) -> Answer:
    pairs = 0 if paired is None else paired.pairs
    return Answer(
        question.title,
        question.paper,
        "" if paired is None else with_interval(paired),
        str(pairs) if pairs == question.pairs else f"{pairs} of {question.pairs}",
        read.get(question.key, MISSING),
    )


def _cheaper(results: dict[str, Any]) -> Answer:
    ratio = cost_at_equal_loss(results["runs"])
    text = "" if ratio is None else "{:.2f} times the FLOPs ({:.2f} to {:.2f})".format(*ratio)
    pairs = len(of_cell(results["runs"], Cell(WIDER[-1]), seeds=SEEDS))
    paper = "6.7B dense trains 70 sequences/s, 1.3B with 128 experts 372 (section 3.3)"
    return Answer("A dense model of the same loss costs 5 times as much", paper, text, str(pairs), UNTESTABLE)


def _faster(results: dict[str, Any]) -> Answer:
    seconds = results.get("speed", {}).get("step_seconds", {})
    known = {"residual", "top_2_argmax"} <= seconds.keys()
    ratio = seconds["residual"] / seconds["top_2_argmax"] if known else None
    reading = MISSING if ratio is None else AGREES if ratio <= 0.9 else DIFFERS
    paper = "more than 10% faster, on GPUs that exchange the second expert's tokens (section 4.1)"
    text = "" if ratio is None else f"{ratio:.2f} of the time of a step"
    return Answer("Residual top-1 is more than 10% faster than top-2", paper, text, "-", reading)


def cost_at_equal_loss(
    runs: Runs, name: str = "moe_16", costs: dict[str, float] | None = None
) -> tuple[float, float, float] | None:
    """Return how many times as much a dense model of a MoE's loss costs, with a 95% interval; None if runs are missing.

    In each seed a straight line is fitted to the dense losses over log cost. The interval is Student's, of the logarithm of the
    ratio.

    Args:
        runs: the results.
        name: configuration of the MoE.
        costs: of a token of each configuration, in any unit; None: FLOPs.
    """
    dense, moe = [of_cell(runs, Cell(wider), seeds=SEEDS) for wider in WIDER], of_cell(runs, Cell(name), seeds=SEEDS)
    seeds = sorted(set(moe).intersection(*dense))
    if len(seeds) < 2:
        return None
    if costs is None:
        flops = {config: of_cell(runs, Cell(config), "flops_per_token") for config in (*WIDER, name)}
        costs = {config: next(iter(values.values())) for config, values in flops.items()}
    cost = np.log([costs[wider] for wider in WIDER])
    ratios = []
    for seed in seeds:
        slope, base = np.polyfit(cost, [losses[seed] for losses in dense], 1)
        ratios.append((moe[seed] - base) / slope - math.log(costs[name]))
    paired = paired_difference(ratios, [0.0] * len(ratios))
    return math.exp(paired.mean), *(math.exp(end) for end in paired.interval())


def beside(results: dict[str, Any]) -> list[str]:
    """Return further comparisons, in sentences; they have no reading."""
    runs = results["runs"]
    lines = []
    sizes = {name: of_cell(runs, cell, "params_total") for name, cell in
             (("MoE-32", Cell("moe_32")), ("PR-MoE", TEACHER), ("the staged student", STAGED_STUDENT))}  # fmt: skip
    if all(sizes.values()):
        standard, *others = ((name, next(iter(values.values()))) for name, values in sizes.items())
        ratios = " and ".join(f"{name} {standard[1] / size:.1f}" for name, size in others)
        lines.append(f"Next to MoE-32, {ratios} times fewer parameters (the paper: 3 and 3.7).")
    for title, first, second in OTHER_PAIRS:
        if (paired := difference(runs, first, second)) is not None:
            lines.append(f"{title}: {with_interval(paired)}, {paired.pairs} pairs.")
    for answer in answers_to(LARGER, runs).values():
        if answer.difference:
            lines.append(f"{answer.title}: {answer.difference}, {answer.pairs} pairs: **{answer.reading}**.")
    costs = results.get("speed", {}).get("step_seconds")
    for title, name in (("MoE-16", "moe_16"), ("PR-MoE", "pr_moe")):
        ratios = [cost_at_equal_loss(runs, name), cost_at_equal_loss(runs, name, costs) if costs else None]
        units = ("FLOPs", "seconds")
        texts = [
            "{:.2f} times its {} ({:.2f} to {:.2f})".format(r[0], unit, *r[1:])
            for r, unit in zip(ratios, units, strict=True)
            if r
        ]
        if texts:
            lines.append(f"A dense model of {title}'s loss takes {' and '.join(texts)}.")
    return lines
