"""lm-eval's tasks on a model, one after the other: metrics, standard errors, and what guessing would give."""

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

from nlgmoe.tools.lm_eval.in_step import OutOfStep, Stranded
from nlgmoe.tools.lm_eval.lm_eval_model import EvaluatedGPT, quiet_contexts, run_tasks
from nlgmoe.tools.lm_eval.tasks import Tasks

SHARES = ("acc", "acc_norm", "exact_match", "em", "f1")  # metrics that are between 0 and 1
Results = dict[str, Any]


def evaluate_task(
    model: EvaluatedGPT, tasks: Tasks, name: str, limit: float | None = None, bootstrap_iters: int = 0
) -> Results:
    """Evaluate one task. Where there are ranks, every rank has to call this, and all have the results.

    Random generators are afterwards as they were before.

    Args:
        model: what is evaluated.
        tasks: where the task is from.
        name: its name there.
        limit: documents at most; below 1, that share of them; None: all.
        bootstrap_iters: draws for the standard errors that have no formula, such as perplexity's; 0: no standard errors.

    Returns:
        What lm-eval returns, and `chance` by task: see `chance`.

    Raises:
        OutOfStep: a rank has failed, so all have.
        ValueError: the task's documents cannot be had, or lack something.
        Stranded: see `in_step.py`.
    """
    outcome: Results | Exception
    with isolate_rng():  # which restores nothing where its block raises
        random.seed(0)
        np.random.seed(1234)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # lm-eval prints what it is at
                outcome = _evaluate(model, tasks, name, limit, bootstrap_iters)
        except Exception as error:
            outcome = error
    if isinstance(outcome, OutOfStep | Stranded):
        raise outcome
    model.ranks.agree("end a task", outcome if isinstance(outcome, Exception) else None)
    assert not isinstance(outcome, Exception)
    return outcome


def _evaluate(model: EvaluatedGPT, tasks: Tasks, name: str, limit: float | None, bootstrap_iters: int) -> Results:
    loaded = tasks.load(name)
    with quiet_contexts(), one_process_bootstrap():
        results: Results = run_tasks(
            lm=model, task_dict=loaded, limit=limit, bootstrap_iters=bootstrap_iters, log_samples=False
        )
    results["chance"] = {task: chance(loaded["tasks"][task]) for task in loaded["tasks"]}
    return results


@contextlib.contextmanager
def one_process_bootstrap() -> Iterator[None]:
    """lm-eval would fork this process, which has threads and perhaps a GPU."""
    with mock.patch.dict("os.environ", {"DISABLE_MULTIPROC": "1"}):
        yield


def chance(task: Any) -> dict[str, float]:
    """What a model that knows nothing gets in an evaluated task, by metric; what has no such level is left out.

    Of a choice, `guess` is the mean of 1 / choices, and `constant` what the commonest answer's number gets if it is always
    given. A text that has to be produced word for word is never guessed.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return {"guess": 0.0}
    choices = Counter(instance.doc_id for instance in task.instances)
    documents = {instance.doc_id: instance.doc for instance in task.instances}
    targets = [task.doc_to_target(document) for document in documents.values()]
    found = {"guess": sum(1 / count for count in choices.values()) / len(choices)}
    if all(isinstance(target, int) for target in targets):
        found["constant"] = max(Counter(targets).values()) / len(targets)
    return found


def merge(parts: list[Results]) -> Results:
    """Results of several tasks as lm-eval gives them of several."""
    whole: Results = {}
    for part in parts:
        for key, value in part.items():
            whole.setdefault(key, {}).update(value)
    return whole


def metrics(results: Results) -> Iterator[tuple[str, str, float, float | None]]:
    """Each metric of `results`: task (or group), metric, value, standard error (None: not known).

    Where a task reads its answers in several ways (lm-eval's filters), the way is in the metric's name after a slash.
    """
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, comma, way = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            ways = {other.partition(",")[2] for other in found if other.startswith(f"{metric},")}
            error = found.get(f"{metric}_stderr,{way}")
            label = f"{metric}/{way}" if len(ways) > 1 else metric
            yield task, label, float(value), float(error) if isinstance(error, int | float) else None
