"""Results of lm-eval: metrics, chance levels, and a table that compares them with the paper's accuracies.

Source of the accuracies: tables 2 and 5 of DeepSpeed-MoE (arXiv 2201.05596), percent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

Results = dict[str, Any]
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em")

TASKS = ("lambada_openai", "piqa", "boolq", "race", "triviaqa", "webqs")  # the paper's columns, under lm-eval's names
METRIC = {"triviaqa": "exact_match", "webqs": "exact_match"}  # other tasks: acc
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
_COLUMNS = 2 * (("dense", 6), ("MoE", 6), ("PR-MoE", 7), ("MoS", 6))  # names and widths, for two sizes


def results_table(results: Results) -> str:
    """Format every metric with its standard error, the chance level and the paper's values; fractions in percent."""
    lines = [
        f"{'':<38}{'this model':>20} {'by chance':>9} {'paper, 350M':>28} {'paper, 1.3B':>28}".rstrip(),
        f"{'task':<26}{'metric':<12}{'value':>11} {'stderr':>8} {'':>9}"
        + "".join(f" {name:>{width}}" for name, width in _COLUMNS),
    ]
    for task, metric, value, error in metrics(results):
        name = metric.partition("/")[0]
        unit = 100 if name in ACCURACIES or name == "f1" else 1
        guess = results["chance"].get(task, {}).get("guess") if name in ACCURACIES else None
        if metric == "exact_match":
            guess = 0.0  # lists of answers too: an answer has to be generated word for word
        stderr = "-" if error is None else f"{unit * error:.3g}"
        line = f"{task:<26}{metric:<12}{unit * value:>11.4g} {stderr:>8} {'' if guess is None else f'{100 * guess:.1f}':>9}"
        if task in TASKS and metric == METRIC.get(task, "acc"):
            for values, (_, width) in zip(ROWS.values(), _COLUMNS, strict=True):
                line += f" {values[TASKS.index(task)]:>{width}.2f}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def merge_results(parts: list[Results]) -> Results:
    """Merge the results of several tasks into lm-eval's form for several tasks."""
    merged: Results = {}
    for part in parts:
        for key, value in part.items():
            merged.setdefault(key, {}).update(value)
    return merged


def metrics(results: Results) -> Iterator[tuple[str, str, float, float | None]]:
    """Yield task (or group), metric, value and standard error (None: unknown) of each metric.

    If a task has several of lm-eval's filters, the name is METRIC/FILTER.
    """
    for task, values in results["results"].items():
        keys = [key.split(",") for key, value in values.items() if "," in key and isinstance(value, int | float)]
        names = Counter(metric for metric, _ in keys)
        for metric, name in keys:
            if not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{name}")
                full_name = f"{metric}/{name}" if names[metric] > 1 else metric
                yield task, full_name, float(values[f"{metric},{name}"]), error if isinstance(error, float) else None


def chance(task: Any) -> dict[str, float]:
    """Return the chance levels of an evaluated task; empty if it computes its scores in a way of its own.

    For multiple choice, `guess` is the mean of right choices / choices, `constant` the accuracy of always giving the most
    frequent answer, where there are several. For generated text, `guess` is 0.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return {"guess": 0.0}
    if callable(task.config.process_results):  # such as truthfulqa_mc2's share of probability
        return {}
    requests = Counter(instance.doc_id for instance in task.instances)
    # This score needs each choice without the question too.
    of_a_choice = 2 if "acc_mutual_info" in task._metric_fn_list else 1
    documents = {instance.doc_id: instance.doc for instance in task.instances}
    targets = [task.doc_to_target(document) for document in documents.values()]
    right = [len(set(target)) if isinstance(target, list) else 1 for target in targets]
    levels = {
        "guess": float(np.mean([n * of_a_choice / requests[doc] for n, doc in zip(right, documents, strict=True)]))
    }
    answers = Counter(target for target in targets if isinstance(target, int))
    if answers.total() == len(targets) and len(answers) > 1:
        levels["constant"] = max(answers.values()) / len(targets)
    return levels
