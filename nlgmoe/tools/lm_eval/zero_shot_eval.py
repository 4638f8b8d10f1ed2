"""Evaluation on lm-eval's tasks during training and validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from nlgmoe.data.training_data import training_data
from nlgmoe.module import MoEGPTModule
from nlgmoe.ranks import AllRanksError
from nlgmoe.validation import require_at_least

if TYPE_CHECKING:
    from nlgmoe.tools.lm_eval.harness import Tasks


class ZeroShotEval(Callback):
    """Evaluates the model on lm-eval's tasks and logs `zero_shot/TASK/METRIC`, and `zero_shot/failed_tasks` if one fails.

    Evaluates at validations of `fit`, and in every `validate`. Every rank evaluates all documents. Evaluation does not change
    training: random generators are restored, and a failed task is counted, with one warning. Needs `pip install -e '.[eval]'`.

    Args:
        tasks: names of lm-eval's tasks, groups or tags.
        limit: maximum number of documents per task; null: all documents.
        every_n_steps: evaluate only at validations after a multiple of this many optimizer steps; null: at every validation.
        include_path: folder with tasks in lm-eval's YAML; null: lm-eval's own, with documents from the Hugging Face hub.
        batch_size: sequences per batch.
    """

    def __init__(
        self,
        tasks: list[str],
        limit: int | None = None,
        every_n_steps: int | None = None,
        include_path: str | None = None,
        batch_size: int = 16,
    ) -> None:
        self.names = list(dict.fromkeys([tasks] if isinstance(tasks, str) else tasks))
        self.limit, self.batch_size = limit, batch_size
        self.include_path, self.every_n_steps = include_path, every_n_steps
        require_at_least(1, self, "limit", "batch_size", "every_n_steps")
        self._tasks: Tasks | None = None
        self._warned: set[str] = set()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the tasks; their documents are loaded at the first evaluation."""
        if stage not in ("fit", "validate"):
            return
        if stage == "fit":  # not of an earlier run
            self._warned = set()
        from nlgmoe.tools.lm_eval.harness import Tasks, quiet

        data = training_data(trainer)
        if data is None or data.tokenizer is None:
            raise AllRanksError("ZeroShotEval needs a data module with a tokenizer, such as nlgmoe.PileDataModule")
        with quiet():
            self._tasks = Tasks(self.names, self.include_path, self.limit)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, and log with the validation's metrics."""
        is_fit = trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking or (is_fit and trainer.global_step % (self.every_n_steps or 1)):
            return
        for name, value in self._evaluate(trainer, pl_module).items():
            pl_module.log(name, value, sync_dist=True)  # equal on all ranks; without it Lightning warns

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Return the metrics of all tasks that do not fail."""
        from nlgmoe.tools.lm_eval.harness import EvaluatedGPT, describe, quiet

        assert isinstance(module, MoEGPTModule) and self._tasks is not None
        gpt = module.gpt
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        with trainer.precision_plugin.val_step_context():  # `HFLM` sets autocast itself
            kind = module.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        modes = {part: part.training for part in gpt.modules()}
        recomputes = gpt.activation_checkpointing
        values: dict[str, float] = {}
        errors: dict[str, Exception] = {}
        with isolate_rng(), quiet():
            model = EvaluatedGPT(gpt, tokenizer, self.batch_size, autocast)
            for name in self.names:
                try:
                    results = self._tasks.evaluate(model, name)
                    values |= {f"zero_shot/{task}/{metric}": value for task, metric, value in _metrics(results)}
                except Exception as error:
                    if isinstance(error, RuntimeError) and trainer.world_size > 1:
                        raise  # of this rank's forward pass, in which the others wait
                    errors[name] = error
        for part, training in modes.items():
            part.training = training
        gpt.activation_checkpointing = recomputes
        for name in errors.keys() - self._warned:
            rank_zero_warn(f"ZeroShotEval: {name} failed, and is left out: {describe(errors[name])}")
        self._warned |= errors.keys()
        return values | ({"zero_shot/failed_tasks": float(len(errors))} if self._warned else {})


def _metrics(results: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield task (or group), metric and value of each metric; METRIC/FILTER if a task has several of lm-eval's filters."""
    for task, values in results["results"].items():
        keys = [key.split(",") for key, value in values.items() if "," in key and isinstance(value, int | float)]
        names = Counter(metric for metric, _ in keys)
        for metric, name in keys:
            if not metric.endswith("_stderr"):
                yield task, f"{metric}/{name}" if names[metric] > 1 else metric, float(values[f"{metric},{name}"])
