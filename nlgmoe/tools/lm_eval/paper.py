"""The paper's zero-shot accuracies, and a table of a model's beside them.

Source: tables 2 and 5 of DeepSpeed-MoE (arXiv 2201.05596), percent.
"""

from __future__ import annotations

from nlgmoe.tools.lm_eval.zero_shot import SHARES, Results, metrics

TASKS = (
    "lambada_openai",
    "piqa",
    "boolq",
    "race",
    "triviaqa",
    "webqs",
)  # the columns of the paper, as lm-eval names them
METRIC = {"triviaqa": "exact_match", "webqs": "exact_match"}  # else acc
ROWS: dict[str, tuple[float, ...]] = {
    "350M dense": (52.03, 69.31, 53.64, 31.77, 3.21, 1.57),
    "350M+MoE-128": (62.70, 74.59, 60.46, 35.60, 16.58, 5.17),
    "350M+PR-MoE-32/64": (63.65, 73.99, 59.88, 35.69, 16.30, 4.73),
    "350M+PR-MoE+MoS": (63.46, 73.34, 58.07, 34.83, 13.69, 5.22),
    "1.3B dense": (63.65, 73.39, 63.39, 35.60, 10.05, 3.25),
    "1.3B+MoE-128": (69.84, 76.71, 64.92, 38.09, 31.29, 7.19),
    "1.3B+PR-MoE-64/128": (70.60, 77.75, 67.16, 38.09, 28.86, 7.73),
    "1.3B+PR-MoE+MoS": (70.17, 77.69, 65.66, 36.94, 29.05, 8.22),
}
_HEADS = ("dense", "MoE", "PR-MoE", "MoS")  # of the columns, for each of the two sizes


def paper_values(task: str, metric: str) -> dict[str, float]:
    """Percent of each of the paper's models; empty if the paper has nothing to compare with."""
    if task not in TASKS or metric != METRIC.get(task, "acc"):
        return {}
    return {row: values[TASKS.index(task)] for row, values in ROWS.items()}


def table(results: Results) -> str:
    """Every metric of an evaluation, its standard error and what guessing gives; in percent where that is its unit."""
    lines = [
        f"{'':<38}{'this model':>20} {'by chance':>9} {'paper, 350M':>28} {'paper, 1.3B':>28}".rstrip(),
        f"{'task':<26}{'metric':<12}{'value':>11} {'stderr':>8} {'':>9}"
        + "".join(f" {head:>{width}}" for _ in range(2) for head, width in zip(_HEADS, (6, 6, 7, 6), strict=True)),
    ]
    for task, metric, value, error in metrics(results):
        share = metric.partition("/")[0] in SHARES
        unit = 100 if share else 1
        guess = results["chance"].get(task, {}).get("guess") if share else None
        if metric == "exact_match":
            guess = 0.0  # also of lists of answers: each has to be the likeliest text
        cells = [f"{task:<26}{metric:<12}{unit * value:>11.4g}", "-" if error is None else f"{unit * error:.3g}"]
        line = f"{cells[0]} {cells[1]:>8} {'' if guess is None else f'{100 * guess:.1f}':>9}"
        published = list(paper_values(task, metric).values())
        for column, number in enumerate(published):
            line += f" {number:>{(6, 6, 7, 6)[column % 4]}.2f}"
        lines.append(line.rstrip())
    return "\n".join(lines)
