"""ZeroShotEval: the steps at which it evaluates, that it does not change training, and that a failing task is skipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from nlgmoe import MoEGPTModule, ZeroShotEval
from nlgmoe.config import GPTConfig
from tests.support.tasks import CONFIG, TASKS, TokenizedData, write_tasks
from tests.support.trainers import trainer

DROPOUT = GPTConfig.from_dict(CONFIG.to_dict() | {"hidden_dropout": 0.1, "attention_dropout": 0.1})
VALIDATES = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}


class Counting(ZeroShotEval):
    """Remembers the steps at which it evaluated, and for each forward pass of the model whether it ran in bf16."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.at: list[int] = []
        self.in_bf16: list[bool] = []

    def _evaluate(self, trainer: Any, module: Any) -> dict[str, float]:
        self.at.append(trainer.global_step)
        hook = module.gpt.blocks[0].register_forward_hook
        handle = hook(lambda *_: self.in_bf16.append(torch.is_autocast_enabled("cpu")))
        values = super()._evaluate(trainer, module)
        handle.remove()
        return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_zero_shot_eval_leaves_training_bit_for_bit_and_has_its_precision(folder: Path, tmp_path: Path) -> None:
    """`HFLM` sets autocast itself, and the exported class turns activation checkpointing off."""
    zero_shot, weights = Counting(list(TASKS), 2, include_path=str(folder)), []
    for callbacks in ([], [zero_shot]):
        module = MoEGPTModule(DROPOUT, activation_checkpointing=True)
        torch.manual_seed(7)
        run = trainer(tmp_path, *callbacks, max_steps=4, precision="bf16-mixed", **VALIDATES)
        run.fit(module, TokenizedData())
        weights.append([*module.state_dict().values(), torch.rand(3)])
        assert module.gpt.training and module.gpt.activation_checkpointing
    assert zero_shot.at == [2, 4]
    assert len(zero_shot.in_bf16) > 2 and all(zero_shot.in_bf16)
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_zero_shot_eval_logs_its_metrics_beside_the_others(folder: Path, tmp_path: Path) -> None:
    zero_shot = Counting(["tiny_choice", "tiny_answer"], 3, every_n_steps=4, include_path=str(folder))
    logger = CSVLogger(tmp_path, name="", version="")
    settings = {"max_steps": 4, "logger": logger, "log_every_n_steps": 1, **VALIDATES}
    trainer(tmp_path, zero_shot, **settings).fit(MoEGPTModule(CONFIG), TokenizedData())
    assert zero_shot.at == [4]  # and not at the validation after step 2
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    logged = [row[header.index("step")] for row in rows if row[header.index("zero_shot/tiny_choice/acc")]]
    assert logged == ["3"]
    assert {"zero_shot/tiny_answer/exact_match"} <= set(header)

    alone = Counting(["tiny_choice"], 3, every_n_steps=5, include_path=str(folder))
    module = MoEGPTModule(CONFIG)
    (found,) = trainer(tmp_path, alone, limit_val_batches=1.0).validate(module, TokenizedData(), verbose=False)
    assert 0 <= found["zero_shot/tiny_choice/acc"] <= 1
    assert {"val/loss", "val/perplexity", "val/perplexity/odd"} <= set(found)


def test_zero_shot_eval_counts_a_failing_task_and_training_goes_on(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    (folder / "tiny_choice_documents.jsonl").write_text('{"question": "no choices"}\n')
    settings = {"include_path": str(folder), "limit": 2}
    zero_shot = ZeroShotEval(["tiny_choice", "tiny_word"], **settings)
    run = trainer(tmp_path, zero_shot, max_steps=4, **VALIDATES)
    logged: list[dict[str, float]] = []
    zero_shot._evaluate = lambda *args: logged.append(found := ZeroShotEval._evaluate(zero_shot, *args)) or found  # type: ignore
    with pytest.warns(UserWarning, match="ZeroShotEval: tiny_choice failed, and is left out: .*choices") as warned:
        run.fit(MoEGPTModule(CONFIG), TokenizedData())
    assert len([each for each in warned if "tiny_choice" in str(each.message)]) == 1
    assert run.global_step == 4
    assert [set(found) for found in logged] == [{"zero_shot/tiny_word/perplexity", "zero_shot/failed_tasks"}] * 2
    assert logged[1]["zero_shot/failed_tasks"] == 1
