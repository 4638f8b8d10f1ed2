"""Write the results into docs/reproduce.md and draw docs/results/reproduce.png, from docs/results/reproduce.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.documents import with_text
from benchmarks.reproduce.cells import BUDGETS, GROWTH, SEEDS, TEACHER, WIDER, Cell
from benchmarks.reproduce.verdicts import of_cell, verdicts
from benchmarks.runs import ROOT

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

PAGE, README, FIGURE = ROOT / "docs/reproduce.md", ROOT / "README.md", ROOT / "docs/results/reproduce.png"
BEGIN, END = "<!-- results: make reproduce-tables -->", "<!-- end of results -->"


def claims_of(results: dict[str, Any]) -> str:
    """Return the table of verdicts in Markdown."""
    rows = [[one.title, one.paper, one.found, f"**{one.verdict}**"] for one in verdicts(results)]
    head = f"Commit {results['commit'][:10]}; {results['machine']}; {len(results['runs'])} runs."
    return "\n".join([head, "", *_table([["claim", "the paper", "here", "verdict"], *rows])])


def text_of(results: dict[str, Any]) -> str:
    """Return all tables in Markdown."""
    lines = [claims_of(results)]
    for verdict in verdicts(results):
        if len(verdict.rows) > 1:
            lines += ["", f"**{verdict.number}. {verdict.title}**", "", *_table(verdict.rows)]
    rates = results["learning_rates"]
    if rates:
        lines += ["", "Learning rates found on seed 0: " + ", ".join(f"{k} {v:.2g}" for k, v in rates.items()) + "."]
    again = {name: run["val_loss_again"] for name, run in results["runs"].items() if "val_loss_again" in run}
    if again:
        apart = max(abs(loss - results["runs"][name]["val_loss"]) for name, loss in again.items())
        largest = f"the largest difference is {apart:.1e} nats" if apart else "the losses are equal to the last bit"
        lines += ["", f"Trained a second time, from the first step: {', '.join(again)}; {largest}."]
    return "\n".join(lines)


def write(results: dict[str, Any], page: Path = PAGE, readme: Path = README, figure: Path = FIGURE) -> None:
    """Replace all tables in the page and the verdicts in the README, and draw the figure.

    Raises:
        ValueError: a page has no place for them.
    """
    for file, content in ((page, text_of(results)), (readme, claims_of(results))):
        file.write_text(with_text(file.read_text(), BEGIN, END, content, name=str(file)))
    draw(results["runs"], figure)


def draw(runs: dict[str, Any], file: Path) -> None:
    """Draw loss against tokens, cost a token and parameters; points are means over the same seeds, with standard errors."""
    experts = {name: [Cell(name, budget) for budget in BUDGETS] for name in GROWTH}
    families = {
        "dense, wider": [Cell(name) for name in WIDER],
        "MoE, more experts": [Cell(name) for name in GROWTH],
        "PR-MoE": [TEACHER],
        "student, staged": [Cell("student", BUDGETS[-1], "staged")],
    }
    panels: dict[str, tuple[str, dict[str, list[Cell]]]] = {
        "tokens": ("tokens", experts),
        "flops_per_token": ("FLOPs per token, forward and backward", families),
        "params_total": ("parameters", families),
    }
    if not all(of_cell(runs, cell) for cell in families["dense, wider"]):
        del panels["flops_per_token"]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.3), sharey=True, layout="constrained")
    for axis, (fact, (label, lines)) in zip(axes, panels.items(), strict=True):
        for name, cells in lines.items():
            if fact == "params_total" and name == "MoE, more experts":
                cells = cells[1:]  # dense is a family of its own there
            done = [cell for cell in cells if of_cell(runs, cell, seeds=SEEDS)]
            losses = [np.array(list(of_cell(runs, cell, seeds=SEEDS).values())) for cell in done]
            if done:
                axis.errorbar(
                    [next(iter(of_cell(runs, cell, fact).values())) for cell in done],
                    [one.mean() for one in losses],
                    [one.std(ddof=1) / len(one) ** 0.5 if len(one) > 1 else 0 for one in losses],
                    marker="o", markersize=4, capsize=3, label=name.replace("moe_", "MoE-"),
                )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("validation loss (nats/token)")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _table(rows: list[list[str]]) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
