"""Write the results into docs/reproduce.md and draw docs/results/reproduce.png, from docs/results/reproduce.json alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.reproduce.cells import BUDGETS, GROWTH, TEACHER, WIDER, Cell
from benchmarks.reproduce.verdicts import of_cell, verdicts
from benchmarks.runs import ROOT

matplotlib.use("Agg")
from matplotlib import pyplot

PAGE, FIGURE = ROOT / "docs/reproduce.md", ROOT / "docs/results/reproduce.png"
BEGIN, END = "<!-- results: make reproduce-tables -->", "<!-- end of results -->"


def text_of(results: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    found = verdicts(results)
    lines = [
        f"Commit {results['commit'][:10]}; {results['machine']}; {len(results['runs'])} runs.",
        "",
        *_table(
            [
                ["claim", "the paper", "here", "verdict"],
                *([v.title, v.paper, v.found, f"**{v.verdict}**"] for v in found),
            ]
        ),
    ]
    for verdict in found:
        if len(verdict.rows) > 1:
            lines += ["", f"**{verdict.number}. {verdict.title}**", "", *_table(verdict.rows)]
    rates = results["learning_rates"]
    if rates:
        lines += ["", "Learning rates found on seed 0: " + ", ".join(f"{k} {v:.2g}" for k, v in rates.items()) + "."]
    return "\n".join(lines)


def write(results: dict[str, Any], page: Path = PAGE, figure: Path = FIGURE) -> None:
    """Replace the results in the page, and draw the figure if there is something to draw.

    Raises:
        ValueError: the page has no place for them.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} lacks the lines {BEGIN} and {END}; put them where the results belong")
    page.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{text_of(results)}\n{END}", text, flags=re.DOTALL))
    draw(results["runs"], figure)


def draw(runs: dict[str, Any], file: Path) -> None:
    """Draw loss against cost a token, and loss against parameters; points are means over seeds with their standard errors."""
    families = {
        "dense, wider": [Cell(name) for name in WIDER],
        "MoE, more experts": [Cell(name) for name in GROWTH],
        "PR-MoE": [TEACHER],
        "student, staged": [Cell("student", BUDGETS[-1], "staged")],
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, fact, label in zip(
        axes, ("flops_per_token", "params_total"), ("FLOPs per token, forward and backward", "parameters"), strict=True
    ):
        for name, cells in families.items():
            done = [cell for cell in cells if of_cell(runs, cell)]
            losses = [np.array(list(of_cell(runs, cell).values())) for cell in done]
            if done:
                axis.errorbar(
                    [next(iter(of_cell(runs, cell, fact).values())) for cell in done],
                    [one.mean() for one in losses],
                    [one.std(ddof=1) / len(one) ** 0.5 if len(one) > 1 else 0 for one in losses],
                    marker="o", capsize=3, label=name,
                )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss (nats/token)")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _table(rows: list[list[str]]) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
