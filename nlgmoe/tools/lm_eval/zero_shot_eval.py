"""Evaluation on lm-eval's tasks during training and validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from nlgmoe.checkpoint.agreement import AllRanksError
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.training_data import training_data
from nlgmoe.module import MoEGPTModule
from nlgmoe.tools.lm_eval.lockstep import BrokenCollectiveError, describe
from nlgmoe.validation import SettingError

if TYPE_CHECKING:
    from nlgmoe.tools.lm_eval.tasks import Tasks


class ZeroShotEval(Callback):
    """Evaluates the model on lm-eval's tasks and logs `zero_shot/TASK/METRIC`, and `zero_shot/failed_tasks` if one fails.

    Evaluates in `fit` at intervals of steps or tokens or at every validation, and in every `validate`. Documents are divided
    among ranks, with expert parallelism too. Evaluation does not change training: random generators are restored, and a
    failed task is counted, with one warning. Needs `pip install -e '.[eval]'`.

    Args:
        tasks: names of lm-eval's tasks or groups, or YAML files of tasks.
        limit: maximum number of documents per task; below 1, a fraction of them; null: all documents.
        every_n_steps: optimizer steps between evaluations in `fit`; null: not by steps.
        every_n_tokens: tokens between evaluations in `fit`, after the step that reaches a multiple; null: not by tokens.
        at_validation: evaluate at every validation of `fit`; null: only if neither of the other two is given.
        num_fewshot: example documents before each document; null: the task's setting.
        data_dir: folder with documents in TASK.jsonl, as `nlgmoe prepare-eval` writes them; null: all from the hub.
        include_path: folder with further tasks in lm-eval's YAML; null: none.
        batch_size: sequences per batch on a rank.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        tasks: list[str],
        limit: float | None = None,
        every_n_steps: int | None = None,
        every_n_tokens: int | None = None,
        at_validation: bool | None = None,
        num_fewshot: int | None = None,
        data_dir: str | None = None,
        include_path: str | None = None,
        batch_size: int = 16,
    ) -> None:
        for name, value in {"every_n_steps": every_n_steps, "every_n_tokens": every_n_tokens}.items():
            if value is not None and value < 1:
                raise SettingError(f"ZeroShotEval: {name}={value} must be at least 1, or null")
        if limit is not None and limit <= 0:
            raise SettingError(f"ZeroShotEval: limit={limit} must be above 0, or null for all documents")
        if batch_size < 1:
            raise SettingError(f"ZeroShotEval: batch_size={batch_size} must be at least 1")
        if at_validation is False and every_n_steps is None and every_n_tokens is None:
            raise SettingError(
                "ZeroShotEval: at_validation=false leaves no time to evaluate; set every_n_steps or every_n_tokens"
            )
        self.names = [tasks] if isinstance(tasks, str) else list(tasks)
        self.limit, self.num_fewshot, self.batch_size = limit, num_fewshot, batch_size
        self.data_dir, self.include_path = data_dir, include_path
        self.every_n_steps, self.every_n_tokens = every_n_steps, every_n_tokens
        by_interval = every_n_steps is not None or every_n_tokens is not None
        self.at_validation = not by_interval if at_validation is None else at_validation
        self._latest = {"step": 0, "tokens": 0}  # at the latest evaluation in `fit`
        self._tasks: Tasks | None = None
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
        from nlgmoe.tools.lm_eval.tasks import Tasks

        data = training_data(trainer)
        if data is None or data.tokenizer_json() is None:
            raise AllRanksError("ZeroShotEval needs a data module with a tokenizer, such as nlgmoe.PileDataModule")
        self._tasks = Tasks(self.names, self.data_dir, self.include_path, self.num_fewshot)

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
        from nlgmoe.tools.lm_eval.lm_eval_model import EvaluatedGPT
        from nlgmoe.tools.lm_eval.zero_shot import evaluate_task, metrics

        assert isinstance(module, MoEGPTModule) and self._tasks is not None
        tokenizer = Tokenizer.from_json(trainer.datamodule.tokenizer_json(), "of the data module")  # type: ignore[attr-defined]
        modes = {part: part.training for part in module.gpt.modules()}
        module.gpt.eval()
        precision = trainer.precision_plugin.val_step_context
        model = EvaluatedGPT(module.gpt, tokenizer, self.batch_size, precision)
        values: dict[str, float] = {}
        failed = 0
        for name in self._tasks.names:
            try:
                results = evaluate_task(model, self._tasks, name, self.limit)
                values |= {f"zero_shot/{task}/{metric}": value for task, metric, value, _ in metrics(results)}
            except BrokenCollectiveError:  # ends the run, as in training
                raise
            except Exception as error:  # all ranks raise together: `lockstep.py`
                failed += 1
                if name not in self._warned:
                    rank_zero_warn(f"ZeroShotEval: {name} failed, and is left out: {describe(error)}")
                self._warned.add(name)
        for part, training in modes.items():
            part.training = training
        return values | ({"zero_shot/failed_tasks": float(failed)} if failed or self._warned else {})


def _position(trainer: Trainer, module: LightningModule) -> dict[str, int]:
    assert isinstance(module, MoEGPTModule)
    return {"step": trainer.global_step, "tokens": module.tokens_seen}
