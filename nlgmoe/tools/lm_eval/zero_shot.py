"""Evaluation of a model on lm-eval's tasks: metrics, standard errors and chance levels."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng

from nlgmoe.tools.lm_eval.lm_eval_model import EvaluatedGPT, quiet_contexts, run_tasks
from nlgmoe.tools.lm_eval.lockstep import BrokenCollectiveError, LockstepError, describe
from nlgmoe.tools.lm_eval.tasks import Tasks
from nlgmoe.validation import RunError, SettingError

ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em")
Results = dict[str, Any]


def evaluate_task(
    model: EvaluatedGPT, tasks: Tasks, name: str, limit: float | None = None, bootstrap_iters: int = 0
) -> Results:
    """Evaluate one task; a collective call that returns the results on every rank. Restores the random generators.

    Args:
        model: the model.
        tasks: the tasks.
        name: name of the task to evaluate.
        limit: maximum number of documents; below 1, a fraction of them; None: all.
        bootstrap_iters: draws for standard errors without a formula, such as perplexity's; 0: no standard errors.

    Returns:
        lm-eval's results, with `chance` by task.
    """
    outcome: Results | Exception
    with isolate_rng():  # does not restore the generators if its block raises
        random.seed(0)
        np.random.seed(1234)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # lm-eval prints its progress
                outcome = _evaluate(model, tasks, name, limit, bootstrap_iters)
        except Exception as error:
            outcome = error
    if isinstance(outcome, LockstepError | BrokenCollectiveError):
        raise outcome
    model.ranks.agree("end a task", outcome if isinstance(outcome, Exception) else None)
    assert not isinstance(outcome, Exception)
    return outcome


def _evaluate(model: EvaluatedGPT, tasks: Tasks, name: str, limit: float | None, bootstrap_iters: int) -> Results:
    loaded = tasks.load(name)
    try:
        # DISABLE_MULTIPROC: the bootstrap must not fork this process, which has threads and perhaps a GPU.
        with quiet_contexts(), mock.patch.dict("os.environ", {"DISABLE_MULTIPROC": "1"}):
            results: Results = run_tasks(
                lm=model, task_dict=loaded, limit=limit, bootstrap_iters=bootstrap_iters, log_samples=False
            )
        results["chance"] = {task: chance(loaded["tasks"][task]) for task in loaded["tasks"]}
    except Exception as error:
        if isinstance(error, OSError | MemoryError | RuntimeError | ImportError | SettingError | RunError):
            raise
        raise RunError(
            f"task {name}: lm-eval cannot evaluate it ({describe(error)}); correct its YAML or its documents"
        ) from error
    return results


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
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            filters = {other.partition(",")[2] for other in values if other.startswith(f"{metric},")}
            error = values.get(f"{metric}_stderr,{name}")
            full_name = f"{metric}/{name}" if len(filters) > 1 else metric
            yield task, full_name, float(value), float(error) if isinstance(error, int | float) else None
