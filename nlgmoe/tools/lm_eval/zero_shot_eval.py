"""lm-eval's tasks during training and validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from nlgmoe.batch import HasTokenizer
from nlgmoe.checkpoint.agreement import AgreedError
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.module import MoEGPTModule
from nlgmoe.tools.lm_eval.in_step import Stranded, describe

if TYPE_CHECKING:
    from nlgmoe.tools.lm_eval.tasks import Tasks


class ZeroShotEval(Callback):
    """Evaluates the model on lm-eval's tasks and logs `zero_shot/TASK/METRIC`, and `zero_shot/failed_tasks` where one fails.

    In `fit` after every so many steps or tokens, or at every validation; in `validate` always. Ranks share the documents, also
    where they share experts. Training goes on as if nothing had been evaluated: no random generator moves, and a task that
    fails is counted and warned of once. Needs `pip install -e '.[eval]'`.

    Args:
        tasks: names of lm-eval's tasks or groups, or YAML files of tasks.
        limit: documents of each task at most; below 1, that share of its documents; null: all documents.
        every_n_steps: optimizer steps between evaluations in `fit`; null: not by steps.
        every_n_tokens: tokens between evaluations in `fit`, at the end of the step that reaches a multiple; null: not by tokens.
        at_validation: evaluate at every validation of `fit`; null: if neither of the other two is given.
        num_fewshot: example documents before each document; null: what the task says.
        data_dir: folder with documents in TASK.jsonl, such as `nlgmoe prepare-eval` writes; null: all are from the hub.
        include_path: folder with further tasks in lm-eval's YAML; null: there are none.
        batch_size: sequences that a rank reads at a time.

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
                raise ValueError(f"ZeroShotEval: {name}={value} must be at least 1, or null")
        if limit is not None and limit <= 0:
            raise ValueError(f"ZeroShotEval: limit={limit} must be above 0, or null for all documents")
        if batch_size < 1:
            raise ValueError(f"ZeroShotEval: batch_size={batch_size} must be at least 1")
        if at_validation is False and every_n_steps is None and every_n_tokens is None:
            raise ValueError(
                "ZeroShotEval: at_validation=false leaves no time to evaluate; set every_n_steps or every_n_tokens"
            )
        self.names = [tasks] if isinstance(tasks, str) else list(tasks)
        self.limit, self.num_fewshot, self.batch_size = limit, num_fewshot, batch_size
        self.data_dir, self.include_path = data_dir, include_path
        self.every_n_steps, self.every_n_tokens = every_n_steps, every_n_tokens
        by_clock = every_n_steps is not None or every_n_tokens is not None
        self.at_validation = not by_clock if at_validation is None else at_validation
        self._clock = {"step": 0, "tokens": 0}  # of the latest evaluation in `fit`
        self._tasks: Tasks | None = None
        self._warned: set[str] = set()

    @override
    def state_dict(self) -> dict[str, Any]:
        """When the latest evaluation was, so that a resumed run makes the ones that are due and no other."""
        return dict(self._clock)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._clock = dict(state_dict)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the tasks; their documents are fetched at their first evaluation.

        Raises:
            ImportError: lm-eval is not installed.
            ValueError: there is no such task or folder, or the data module has no tokenizer.
        """
        if stage not in ("fit", "validate"):
            return
        from nlgmoe.tools.lm_eval.tasks import Tasks

        if not isinstance(getattr(trainer, "datamodule", None), HasTokenizer):
            raise AgreedError("ZeroShotEval needs a data module with a tokenizer, such as nlgmoe.PileDataModule")
        self._tasks = Tasks(self.names, self.data_dir, self.include_path, self.num_fewshot)

    # ---- when

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Here, and not at the end of the batch before, so that callbacks that come after this one do not time it."""
        self._evaluate_if_due(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last step."""
        self._evaluate_if_due(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With the other results of this validation."""
        fits = trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking or (fits and not self.at_validation):
            return
        if fits:  # nothing is due any more by the clock
            self._clock = _now(trainer, pl_module)
        for name, value in self._evaluate(trainer, pl_module).items():
            pl_module.log(name, value, sync_dist=True)  # every rank has the same value; this tells Lightning so

    def _evaluate_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        now = _now(trainer, module)
        every = {"step": self.every_n_steps, "tokens": self.every_n_tokens}
        if any(n is not None and now[key] // n > self._clock[key] // n for key, n in every.items()):
            self._clock = now
            found = self._evaluate(trainer, module)
            for logger in trainer.loggers:
                # A validation after this step would be logged at the same number.
                logger.log_metrics(found, step=trainer.global_step - 1)
                logger.save()

    # ---- what

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Every task's metrics; of one that fails, nothing."""
        from nlgmoe.tools.lm_eval.lm_eval_model import EvaluatedGPT
        from nlgmoe.tools.lm_eval.zero_shot import evaluate_task, metrics

        assert isinstance(module, MoEGPTModule) and self._tasks is not None
        tokenizer = Tokenizer.from_json(trainer.datamodule.tokenizer_json(), "of the data module")  # type: ignore[attr-defined]
        modes = {part: part.training for part in module.gpt.modules()}
        module.gpt.eval()
        precision = trainer.precision_plugin.val_step_context
        model = EvaluatedGPT(module.gpt, tokenizer, self.batch_size, precision)
        found: dict[str, float] = {}
        failed = 0
        for name in self._tasks.names:
            try:
                results = evaluate_task(model, self._tasks, name, self.limit)
                found |= {f"zero_shot/{task}/{metric}": value for task, metric, value, _ in metrics(results)}
            except Stranded:  # nothing can be agreed on any more: it ends the run, as in training
                raise
            except Exception as error:  # of several ranks, all are here: `in_step.py`
                failed += 1
                self._warn(name, error)
        for part, training in modes.items():
            part.training = training
        return found | ({"zero_shot/failed_tasks": float(failed)} if failed or self._warned else {})

    def _warn(self, name: str, error: Exception) -> None:
        if name not in self._warned:
            rank_zero_warn(f"ZeroShotEval: {name} failed, and is left out: {describe(error)}")
        self._warned.add(name)


def _now(trainer: Trainer, module: LightningModule) -> dict[str, int]:
    assert isinstance(module, MoEGPTModule)
    return {"step": trainer.global_step, "tokens": module.tokens_seen}
