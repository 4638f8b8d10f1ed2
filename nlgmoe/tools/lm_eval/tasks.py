"""lm-eval's tasks: found by name, loaded, and evaluated.

`lm_eval.evaluate` is called, not `simple_evaluate`: that returns None where LOCAL_RANK is not 0, lists the packages and devices
of the machine at each call (a second), and has no place at which all ranks agree that a task cannot be loaded.
"""

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
from nlgmoe.tools.lm_eval.lm_eval_model import EvaluatedGPT, TaskManager, run_tasks
from nlgmoe.tools.lm_eval.results import Results, chance
from nlgmoe.validation import RunError, SettingError, require

SEED = 1234  # lm-eval's


class Tasks:
    """Some of lm-eval's tasks, groups or tags; the arguments are those of `ZeroShotEval`.

    Raises:
        ValueError: a name is unknown, or the folder or the file of a task in it cannot be read.
    """

    def __init__(
        self, names: Sequence[str], include_path: str | None, limit: int | None = None, num_fewshot: int | None = None
    ) -> None:
        require(bool(names), "tasks= names no task; name at least one, such as lambada_openai")
        require(include_path is None or Path(include_path).is_dir(), f"include_path={include_path} is not a folder")
        self._limit, self._num_fewshot = limit, num_fewshot
        self._loaded: dict[str, dict[str, Any]] = {}
        self._manager = TaskManager(include_path=include_path, include_defaults=False)
        entries = {name: self._manager.task_index.get(name) for name in names}
        for (
            name,
            entry,
        ) in entries.items():  # lm-eval skips a file that it cannot read, and takes its own task of that name
            if include_path is not None and entry is None and (file := Path(include_path, f"{name}.yaml")).exists():
                raise SettingError(
                    f"include_path={include_path}: {file} cannot be read (it is no task's YAML, or includes a file that is not "
                    "there); correct it, or run `nlgmoe prepare-eval` again"
                )
        if not all(entry is not None and entry.kind.name == "TASK" for entry in entries.values()):
            self._manager = TaskManager(include_path=include_path)  # 20 seconds for 14,000 built-in tasks
        for name in names:
            if name not in (index := self._manager.task_index):
                close = did_you_mean(name, index)
                raise SettingError(
                    f"tasks={name}: lm-eval has no such task{close}; tasks of your own need include_path"
                )

    def load(self, name: str) -> dict[str, Any]:
        """Load a task, or the tasks of a group or tag, with their documents, for lm-eval's `evaluate`; once each.

        A collective: all ranks raise if one cannot load the task, or build its prompts.
        """
        if name in self._loaded:
            return self._loaded[name]
        with raise_on_all_ranks():
            try:
                loaded = dict(self._manager.load(name))
                for task_name, task in loaded["tasks"].items():
                    _set_examples(task_name, task, self._num_fewshot)
                    task.set_fewshot_seed(SEED)
                    task.build_all_requests(limit=self._limit)
            except Exception as error:
                raise SettingError(
                    f"tasks={name}: lm-eval cannot load it ({describe(error)}); correct its YAML or documents, or lower "
                    "num_fewshot; without a network, run `nlgmoe prepare-eval DIR` and set include_path=DIR"
                ) from error
        return self._loaded.setdefault(name, loaded)

    def evaluate(self, model: EvaluatedGPT, name: str, bootstrap_iters: int = 0) -> Results:
        """Return lm-eval's results, with `chance` by task; seeds the random generators. All ranks evaluate all documents.

        `bootstrap_iters` are the draws for standard errors without a formula, such as perplexity's; 0: no standard errors.
        """
        loaded = self.load(name)
        random.seed(0)  # for examples, generated texts and the bootstrap
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(SEED)
        try:
            results: Results = run_tasks(
                lm=model, task_dict=loaded, limit=self._limit, bootstrap_iters=bootstrap_iters, log_samples=False
            )
            results["chance"] = {task_name: chance(task) for task_name, task in loaded["tasks"].items()}
        except RuntimeError:  # of a forward pass, such as a lack of memory
            raise
        except Exception as error:
            raise RunError(
                f"task {name}: lm-eval cannot evaluate it ({describe(error)}); correct its YAML or documents"
            ) from error
        return results


def describe(error: BaseException) -> str:
    """Format an exception in one line; the type is left out for errors that are written for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def _set_examples(name: str, task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples, as lm-eval's command does: a task that sets 0 keeps 0."""
    given = task.get_config("num_fewshot")
    if given is None or (given and num_fewshot is not None):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    elif num_fewshot:
        rank_zero_warn(f"num_fewshot={num_fewshot} does not count for task {name}: its YAML sets 0 examples")
