"""Write the tables of docs/results/claims.md and claim_models.md, and the figures, from docs/results/reproduce.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.documents import markdown_table, with_text
from benchmarks.reproduce.cells import BUDGETS, GROWTH, MARGIN, SEEDS, STEP_TOKENS, TEACHER, WIDER, Cell
from benchmarks.reproduce.questions import (
    AGREES,
    DIFFERS,
    LARGER,
    QUESTIONS,
    SIZES,
    STAGED_STUDENT,
    UNRESOLVED,
    Question,
)
from benchmarks.reproduce.readings import MISSING, Answer, answers, answers_to, beside, difference, of_cell
from benchmarks.runs import ROOT, short

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

FIGURES = ROOT / "docs/results"
PAGE = FIGURES / "claims.md"
BEGIN, END = "<!-- results: make reproduce-tables -->", "<!-- end of results -->"
COLOURS = {AGREES: "tab:green", DIFFERS: "tab:red", UNRESOLVED: "tab:gray", MISSING: "tab:gray"}
LIMITS = -0.25, 0.1  # of the axis of differences, nats
# Questions that the gate answers beside its strong baseline: the row, and the sign that turns it into the question's difference.
STRONG = {"experts": ("dense", -1), "everywhere": ("second_half", 1)}


def long_table(results: dict[str, Any]) -> str:
    """Return the table of claims.md, and what is beside it."""
    lines = [f"Commit {results['commit'][:10]}; {results['machine']}; {len(results['runs'])} runs."]
    if "speed" in results:
        lines[0] += f" Steps were timed at {short(results['speed']['commit'])}."
    lines.append("")
    rows = [[*_row(answer), answer.paper] for answer in answers(results).values()]
    lines += [markdown_table(["question", "difference (95% interval)", "pairs", "reading", "the paper"], rows), ""]
    lines += [f"- {line}" for line in beside(results)]
    rates = ", ".join(f"{name} {rate:.2g}" for name, rate in results["learning_rates"].items())
    return "\n".join([*lines, f"- Learning rates found on seed 0: {rates}; the other models' are interpolated."])


def page_of_models(results: dict[str, Any]) -> str:
    """Return claim_models.md: a table of the models, and one of the budgets."""
    models, budgets = (markdown_table(head, rows) for head, *rows in (_models(results), _budgets(results)))
    return f"""# The models of the claims

`make reproduce-tables` writes this page; [claims.md](claims.md) has the questions.
Commit {results["commit"][:10]}; {results["machine"]}.
Losses are means with standard errors, in nats per token.

{models}

By budget, over seeds 1 to 3:

{budgets}
"""


def _row(answer: Answer) -> list[str]:
    return [answer.title, answer.difference, answer.pairs, f"**{answer.reading}**"]


def _models(results: dict[str, Any]) -> list[list[str]]:
    """Return a row for each model at the whole budget."""
    runs, seconds = results["runs"], results.get("speed", {}).get("step_seconds", {})
    rows = [
        [
            "model",
            "parameters",
            "active",
            "tokens per active parameter",
            "MFLOPs a token",
            "validation loss",
            "ms a step",
            "runs",
        ]
    ]
    cells = dict.fromkeys(
        [
            *(Cell(name) for name in (*WIDER, *GROWTH[1:])),
            *(c for q in QUESTIONS for c in (q.second, q.first)),
            Cell("top_2"),
        ]
    )
    for cell in cells:
        own = [runs[f"{cell.name}-seed{seed}"] for seed in of_cell(runs, cell)]
        if not own:
            continue
        losses = [run["val_loss"] for run in own]
        error = np.std(losses, ddof=1) / math.sqrt(len(own)) if len(own) > 1 else math.nan
        ms = f"{1000 * seconds[cell.config]:.0f}" if cell.config in seconds else ""
        rows.append(
            [cell.name.removesuffix("@1"), f"{own[0]['params_total'] / 1e6:.2f}M", f"{own[0]['params_active'] / 1e6:.2f}M",
             f"{own[0]['tokens_per_active_parameter']:.1f}", f"{own[0]['flops_per_token'] / 1e6:.2f}",
             f"{np.mean(losses):.4f} ± {error:.4f}", ms, str(len(own))]
        )  # fmt: skip
    return rows


def _budgets(results: dict[str, Any]) -> list[list[str]]:
    """Return the mean losses at each budget, over the same seeds for all."""
    runs = results["runs"]
    columns = {name: (name, None) for name in GROWTH} | {
        "student": ("student", None), "student, to the end": ("student", "full"), "student, staged": ("student", "staged"),
    }  # fmt: skip
    rows = [["tokens", *columns]]
    for budget in BUDGETS:
        losses = [of_cell(runs, Cell(config, budget, how), seeds=SEEDS) for config, how in columns.values()]  # type: ignore[arg-type]
        tokens = next(iter(of_cell(runs, Cell("dense", budget), "tokens").values()), 0)
        rows.append([f"{tokens / 1e6:.1f}M", *(f"{np.mean(list(v.values())):.4f}" if v else "" for v in losses)])
    return rows


def write(results: dict[str, Any], page: Path = PAGE, figures: Path = FIGURES) -> None:
    """Replace the table of the page, write the page of models beside the figures, and draw these.

    Raises:
        ValueError: the page has no place for it.
    """
    page.write_text(with_text(page.read_text(), BEGIN, END, long_table(results), name=str(page)))
    (figures / "claim_models.md").write_text(page_of_models(results))
    runs = results["runs"]
    answered = answers(results) | answers_to(LARGER, runs)
    draw_differences(QUESTIONS, answered, runs, figures / "claims.png")
    draw_differences(SIZES, answered, runs, figures / "sizes.png")
    draw_costs(results, figures / "costs.png")


def draw_differences(
    questions: Sequence[Question], answered: dict[str, Answer], runs: dict[str, Any], file: Path
) -> None:
    """Draw paired differences with 95% intervals and the margin of "as good as"; blue: beside the gate's strong baseline."""
    gate = json.loads((FIGURES / "gate.json").read_text())
    strong = {row["name"]: row["verdicts"]["tokens"] for row in gate if row.get("baseline") == "strong"}
    figure, axis = pyplot.subplots(figsize=(8.4, 0.42 * len(questions) + 1.0), layout="constrained")
    for row, question in enumerate(reversed(questions)):
        paired = difference(runs, question.first, question.second, question.pairs)
        if paired is None:
            continue
        low, high = paired.interval()
        answer = answered[question.key]
        missing, colour = answer.reading == MISSING, COLOURS[answer.reading]
        axis.plot([low, high], [row, row], color=colour, linestyle=":" if missing else "-", linewidth=2)
        axis.plot(paired.mean, row, "o", color=colour, fillstyle="none" if missing else "full")
        if question.rule == "not worse":
            axis.fill_betweenx([row - 0.4, row + 0.4], LIMITS[0], MARGIN, color="tab:green", alpha=0.08, linewidth=0)
        if question.key in STRONG:
            name, sign = STRONG[question.key]
            mean, *ends = (sign * strong[name][key] for key in ("mean", "low", "high"))
            axis.plot(ends, [row - 0.25] * 2, color="tab:blue", linewidth=2)
            axis.plot(mean, row - 0.25, "s", color="tab:blue", markersize=5)
        axis.annotate(f"{answer.reading}, {answer.pairs} pairs", (1.01, row), xycoords=("axes fraction", "data"),
                      va="center", fontsize=8, color=colour)  # fmt: skip
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(questions)), [question.title for question in reversed(questions)], fontsize=8)
    axis.set_xlim(*LIMITS)
    axis.set_xticks([-0.2, -0.1, 0.0, 0.1])
    axis.set_xlabel(
        f"difference in validation loss (nats/token), 95% interval\nleft: better; shaded: as good as, margin {MARGIN}",
        fontsize=8,
    )
    axis.plot([], [], "s-", color="tab:blue", label="beside the gate's strong baseline")
    axis.legend(fontsize=8, loc="lower left")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def draw_costs(results: dict[str, Any], file: Path) -> None:
    """Draw loss against FLOPs and against seconds of the whole run; points are means, with standard errors."""
    runs, seconds = results["runs"], results.get("speed", {}).get("step_seconds", {})
    steps = {
        cell: next(iter(of_cell(runs, cell, "tokens").values()), 0) / STEP_TOKENS
        for cell in map(Cell, (*WIDER, *GROWTH, "pr_moe", "student"))
    }
    families = {
        "dense, wider": [Cell(name) for name in WIDER],
        "MoE, more experts": [Cell(name) for name in GROWTH],
        "PR-MoE": [TEACHER],
        "student, staged": [STAGED_STUDENT],
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(8.4, 3.2), sharey=True, layout="constrained")
    for axis, label in zip(axes, ("FLOPs of the run", "seconds of the run, one thread"), strict=True):
        for name, cells in families.items():
            points = []
            for cell in cells:
                losses = list(of_cell(runs, cell, seeds=SEEDS).values())
                if not losses or (axis is axes[1] and cell.config not in seconds):
                    continue
                tokens = next(iter(of_cell(runs, cell, "tokens").values()))
                cost = tokens * next(iter(of_cell(runs, cell, "flops_per_token").values()))
                if axis is axes[1]:
                    cost = steps[Cell(cell.config)] * seconds[cell.config]
                points.append(
                    (cost, np.mean(losses), np.std(losses, ddof=1) / len(losses) ** 0.5 if len(losses) > 1 else 0)
                )
            if points:
                axis.errorbar(*zip(*points, strict=True), marker="o", markersize=4, capsize=3, label=name)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss (nats/token)")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
