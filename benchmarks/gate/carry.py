"""Do verdicts carry over from one baseline to another?

The rule was committed before the runs.

For each idea of `CARRIED`, D = d beside `strong` - d beside `paper`, of the same seeds at equal tokens. The reading is

    changed           a paired t test of D = 0 has p < 5% after Holm's correction over the four ideas
    no change shown   otherwise; half of the 95% interval says which change would not have shown

Printed intervals are not corrected. A loss is of one processor and commit in each d; D compares differences of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from scipy import stats

from benchmarks.documents import markdown_table
from benchmarks.gate import page
from benchmarks.gate.campaign import CARRIED
from benchmarks.gate.page import Row, baseline_of
from nlgmoe.tools.report.groups import PairedDifference, paired_difference

matplotlib.use("Agg")
from matplotlib import pyplot

LEVEL, FIGURE = 0.05, "baselines.png"
PLACES = {"paper": "tab:gray", "strong": "tab:blue", "strong_2x": "tab:green"}


def effects(row: Row) -> dict[str, float]:
    """Return the differences of a row at equal tokens, candidate - baseline in nats, by seed."""
    ours, theirs = (
        row["losses"][side][str(steps)]
        for side, steps in zip(("candidate", "baseline"), row["steps"]["tokens"], strict=True)
    )
    return {seed: ours[seed] - theirs[seed] for seed in ours}


def changes(rows: Sequence[Row]) -> dict[str, tuple[PairedDifference, str]]:
    """Return D and its reading, by idea, of those that have rows beside both baselines."""
    of = {(row["name"], baseline_of(row)): effects(row) for row in rows}
    found: dict[str, PairedDifference] = {}
    for idea in CARRIED:
        strong, paper = (of.get((idea, base), {}) for base in ("strong", "paper"))
        if shared := sorted(strong.keys() & paper.keys()):
            found[idea] = paired_difference([strong[seed] for seed in shared], [paper[seed] for seed in shared])
    p = {idea: 2 * float(stats.t.sf(abs(D.mean) / D.error, D.pairs - 1)) for idea, D in found.items()}
    readings, still = dict[str, str](), True
    for rank, idea in enumerate(sorted(p, key=p.__getitem__)):  # Holm: the first that is not small enough ends it
        still = still and p[idea] * (len(CARRIED) - rank) < LEVEL
        readings[idea] = "changed" if still else "no change shown"
    return {idea: (D, readings[idea]) for idea, D in found.items()}


def table(rows: Sequence[Row]) -> str:
    """Return the table of the changes; empty without rows beside both baselines."""
    lines = []
    for idea, (D, reading) in changes(rows).items():
        low, high = D.interval()
        lines.append(
            [idea, f"{D.mean:+.3f} ({low:+.3f} to {high:+.3f})", f"**{reading}**", f"{high - D.mean:.3f}", D.pairs]
        )
    head = ["idea", "D, nats (95% interval)", "reading", "not shown below", "pairs"]
    return f"Do verdicts carry over to `strong`?\n\n{markdown_table(head, lines)}" if lines else ""


def tables(rows: Sequence[Row]) -> str:
    """Return all tables of docs/results/gate.md."""
    return "\n\n".join(filter(None, [page.table(rows), table(rows)]))


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw the effects of the ideas with their 95% intervals, a line a baseline."""
    of: dict[tuple[str, str], Any] = {(row["name"], baseline_of(row)): row["verdicts"]["tokens"] for row in rows}
    figure, axis = pyplot.subplots(figsize=(8.4, 3.2), layout="constrained")
    for place, (base, colour) in enumerate(PLACES.items()):
        for line, idea in enumerate(reversed(CARRIED)):
            if judged := of.get((idea, base)):
                y, label = line + 0.22 * (1 - place), base if idea == CARRIED[0] else None
                axis.plot([judged["low"], judged["high"]], [y, y], color=colour, linewidth=2)
                axis.plot(judged["mean"], y, "o", color=colour, label=label)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(CARRIED)), [*reversed(CARRIED)], fontsize=8)
    axis.set_xlabel(
        "validation loss minus the baseline's at equal tokens, nats a token, 95% interval; left: better", fontsize=8
    )
    axis.legend(fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
