"""Evaluation on lm-eval's tasks during training and validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from nlgmoe.checkpoint.agreement import AllRanksError
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.training_data import training_data
from nlgmoe.module import MoEGPTModule
from nlgmoe.tools.lm_eval.evaluate import check_settings
from nlgmoe.validation import SettingError

if TYPE_CHECKING:
    from nlgmoe.tools.lm_eval.lm_eval_model import TaskManager


class ZeroShotEval(Callback):
    """Evaluates the model on lm-eval's tasks and logs `zero_shot/TASK/METRIC`, and `zero_shot/failed_tasks` if one fails.

    Evaluates in `fit` at intervals of steps or tokens or at every validation, and in every `validate`. Every rank evaluates
    all documents. Evaluation does not change training: random generators are restored, and a failed task is counted, with
    one warning. Needs `pip install -e '.[eval]'`.

    Args:
        tasks: names of lm-eval's tasks, groups or tags.
        limit: maximum number of documents per task; null: all documents.
        every_n_steps: optimizer steps between evaluations in `fit`; null: not by steps.
        every_n_tokens: tokens between evaluations in `fit`, after the step that reaches a multiple; null: not by tokens.
        at_validation: evaluate at every validation of `fit`; null: only if neither of the other two is given.
        num_fewshot: example documents before each document; null: the task's setting.
        include_path: folder with tasks in lm-eval's YAML, as `nlgmoe prepare-eval` writes them; null: lm-eval's own, with
            documents from the Hugging Face hub.
        batch_size: sequences per batch.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        tasks: list[str],
        limit: int | None = None,
        every_n_steps: int | None = None,
        every_n_tokens: int | None = None,
        at_validation: bool | None = None,
        num_fewshot: int | None = None,
        include_path: str | None = None,
        batch_size: int = 16,
    ) -> None:
        check_settings(limit, num_fewshot, batch_size, every_n_steps=every_n_steps, every_n_tokens=every_n_tokens)
        if at_validation is False and every_n_steps is None and every_n_tokens is None:
            raise SettingError(
                "ZeroShotEval: at_validation=false leaves no time to evaluate; set every_n_steps or every_n_tokens"
            )
        self.names = list(dict.fromkeys([tasks] if isinstance(tasks, str) else tasks))
        self.limit, self.num_fewshot, self.batch_size = limit, num_fewshot, batch_size
        self.include_path = include_path
        self.every_n_steps, self.every_n_tokens = every_n_steps, every_n_tokens
        by_interval = every_n_steps is not None or every_n_tokens is not None
        self.at_validation = not by_interval if at_validation is None else at_validation
        self._latest = {"step": 0, "tokens": 0}  # at the latest evaluation in `fit`
        self._manager: TaskManager | None = None
        self._loaded: dict[str, dict[str, Any]] = {}
        self._warned: set[str] = set()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the position of the latest evaluation, from which a resumed run continues the intervals."""
        return dict(self._latest)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position of the latest evaluation."""
        self._latest = dict(state_dict)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the tasks; their documents are loaded at the first evaluation."""
        if stage not in ("fit", "validate"):
            return
        if stage == "fit":  # not of an earlier run
            self._latest, self._warned = {"step": 0, "tokens": 0}, set()
        from nlgmoe.tools.lm_eval.lm_eval_model import quiet
        from nlgmoe.tools.lm_eval.tasks import find_tasks

        data = training_data(trainer)
        if data is None or data.tokenizer_json() is None:
            raise AllRanksError("ZeroShotEval needs a data module with a tokenizer, such as nlgmoe.PileDataModule")
        with quiet():
            self._manager, self._loaded = find_tasks(self.names, self.include_path), {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Evaluate before the next step, not after the last, so that later callbacks do not time it."""
        self._evaluate_if_due(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate after the last step, if due."""
        self._evaluate_if_due(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, and log with the validation's metrics."""
        is_fit = trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking or (is_fit and not self.at_validation):
            return
        if is_fit:  # this evaluation counts for the intervals too
            self._latest = _position(trainer, pl_module)
        for name, value in self._evaluate(trainer, pl_module).items():
            pl_module.log(name, value, sync_dist=True)  # equal on all ranks; without it Lightning warns

    def _evaluate_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        now = _position(trainer, module)
        every = {"step": self.every_n_steps, "tokens": self.every_n_tokens}
        if any(n is not None and now[key] // n > self._latest[key] // n for key, n in every.items()):
            self._latest = now
            metrics = self._evaluate(trainer, module)
            for logger in trainer.loggers:
                # Lightning logs a validation after this step at the same number.
                logger.log_metrics(metrics, step=trainer.global_step - 1)
                logger.save()

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Return the metrics of all tasks that do not fail."""
        from nlgmoe.tools.lm_eval.lm_eval_model import EvaluatedGPT, quiet
        from nlgmoe.tools.lm_eval.results import metrics
        from nlgmoe.tools.lm_eval.tasks import describe, evaluate_task, load_task

        assert isinstance(module, MoEGPTModule) and self._manager is not None
        gpt = module.gpt
        tokenizer = Tokenizer.from_json(trainer.datamodule.tokenizer_json(), "of the data module")  # type: ignore[attr-defined]
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
                    if name not in self._loaded:
                        self._loaded[name] = load_task(self._manager, name, self.limit, self.num_fewshot)
                    results = evaluate_task(model, self._loaded[name], self.limit)
                    values |= {f"zero_shot/{task}/{metric}": value for task, metric, value, _ in metrics(results)}
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


def _position(trainer: Trainer, module: LightningModule) -> dict[str, int]:
    assert isinstance(module, MoEGPTModule)
    return {"step": trainer.global_step, "tokens": module.tokens_seen}
