"""lm-eval's tasks: found by name, loaded, and evaluated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from nlgmoe.cli.errors import did_you_mean
from nlgmoe.ranks import raise_on_all_ranks
from nlgmoe.tools.lm_eval.lm_eval_model import EvaluatedGPT, TaskManager, load_yaml, run_tasks
from nlgmoe.tools.lm_eval.results import Results, chance
from nlgmoe.validation import RunError, SettingError, require

SEED = 1234  # lm-eval's


def find_tasks(names: Sequence[str], include_path: str | Path | None = None) -> TaskManager:
    """Return lm-eval's index of tasks, after checking that it has `names`.

    Args:
        names: lm-eval's tasks, groups or tags.
        include_path: folder with further tasks in lm-eval's YAML; a task with the name of a built-in one replaces it.

    Raises:
        ValueError: a name is not in the index, or the folder or one of its files cannot be read.
    """
    require(bool(names), "tasks= names no task; name at least one, such as lambada_openai")
    own = []
    if include_path is not None:
        require(Path(include_path).is_dir(), f"include_path={include_path} is not a folder")
        own = [include_path]
        for file in sorted(Path(include_path).rglob("*.yaml")):
            try:
                load_yaml(file, resolve_func=False)
            except Exception as error:  # lm-eval would skip the file, and take a built-in task of that name
                reason = f"{file} cannot be read ({describe(error)})"
                raise SettingError(
                    f"include_path={include_path}: {reason}; correct it, or run `nlgmoe prepare-eval` again"
                ) from error
    manager = TaskManager(include_path=own, include_defaults=False)
    entries = [manager.task_index.get(name) for name in names]
    if not all(entry is not None and entry.kind.name == "TASK" for entry in entries):
        manager = TaskManager(include_path=own)  # 20 seconds for 14,000 built-in tasks
    for name in names:
        if name not in manager.task_index:
            close = did_you_mean(name, manager.task_index)
            raise SettingError(f"tasks={name}: lm-eval has no such task{close}; tasks of your own need include_path")
    return manager


def load_task(
    manager: TaskManager, name: str, limit: int | None = None, num_fewshot: int | None = None
) -> dict[str, Any]:
    """Load a task, or the tasks of a group or tag, with their documents, as lm-eval's `evaluate` takes them.

    A collective: all ranks raise if one cannot load the task, or build its prompts.
    """
    with raise_on_all_ranks():
        try:
            loaded = dict(manager.load(name))
            for task_name, task in loaded["tasks"].items():
                _set_examples(task_name, task, num_fewshot)
            _seed(loaded)
            for task in loaded["tasks"].values():
                task.build_all_requests(limit=limit)
        except Exception as error:
            raise SettingError(
                f"tasks={name}: lm-eval cannot load it ({describe(error)}); correct its YAML or documents, or lower "
                "num_fewshot; without a network, run `nlgmoe prepare-eval DIR` and set include_path=DIR"
            ) from error
    return loaded


def evaluate_task(
    model: EvaluatedGPT, loaded: dict[str, Any], limit: int | None = None, bootstrap_iters: int = 0
) -> Results:
    """Evaluate what `load_task` returned; seeds the random generators.

    Args:
        model: the model; all ranks evaluate all documents.
        loaded: the tasks.
        limit: maximum number of documents per task; None: all.
        bootstrap_iters: draws for standard errors without a formula, such as perplexity's; 0: no standard errors.

    Returns:
        lm-eval's results, with `chance` by task.
    """
    _seed(loaded)
    try:
        results: Results = run_tasks(
            lm=model, task_dict=loaded, limit=limit, bootstrap_iters=bootstrap_iters, log_samples=False
        )
        results["chance"] = {name: chance(task) for name, task in loaded["tasks"].items()}
    except RuntimeError:  # of a forward pass, such as a lack of memory
        raise
    except Exception as error:
        names = ",".join(loaded["tasks"])
        raise RunError(
            f"task {names}: lm-eval cannot evaluate it ({describe(error)}); correct its YAML or documents"
        ) from error
    return results


def describe(error: BaseException) -> str:
    """Format an exception in one line; the type is left out for errors that are written for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def _set_examples(name: str, task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples, as lm-eval's command does: a task that sets 0 keeps 0."""
    given = task.get_config("num_fewshot")
    if num_fewshot is not None and given != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif given is None:
        task.set_config(key="num_fewshot", value=0)
    elif num_fewshot:
        rank_zero_warn(f"num_fewshot={num_fewshot} does not count for task {name}: its YAML sets 0 examples")


def _seed(loaded: dict[str, Any]) -> None:
    """Seed the draws of examples, of generated texts, and of the bootstrap."""
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)
