"""ZeroShotEval: the steps at which it evaluates, that it does not change training, and that a failing task is skipped."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from nlgmoe import MoEGPTModule, ZeroShotEval
from nlgmoe.config import GPTConfig
from tests.checkpoint.test_portable import SaveAt
from tests.eval.tiny_tasks import CONFIG, TASKS, TokenizedData, write_tasks
from tests.synthetic import SyntheticData
from tests.test_module import trainer

DROPOUT = GPTConfig.from_dict(CONFIG.to_dict() | {"hidden_dropout": 0.1, "attention_dropout": 0.1})
VALIDATES = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}


class Counting(ZeroShotEval):
    """Remembers the steps at which it evaluated."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.at: list[int] = []

    def _evaluate(self, trainer: Any, module: Any) -> dict[str, float]:
        self.at.append(trainer.global_step)
        return super()._evaluate(trainer, module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_training_is_the_same_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    weights = []
    for callbacks in (
        [],
        [Counting(list(TASKS), limit=2, every_n_steps=1, at_validation=True, include_path=str(folder))],
    ):
        module = MoEGPTModule(DROPOUT)
        torch.manual_seed(7)
        trainer(tmp_path, *callbacks, max_steps=4, **VALIDATES).fit(module, TokenizedData())
        weights.append([*module.state_dict().values(), torch.rand(3)])
        assert module.gpt.training
    assert callbacks[0].at == [1, 2, 3, 4]  # once where a validation comes too
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_the_models_precision_and_recomputation_are_those_of_training(folder: Path, tmp_path: Path) -> None:
    """`HFLM` sets autocast itself, and the exported class turns activation checkpointing off."""
    passes: list[bool] = []

    class Watching(ZeroShotEval):
        def _evaluate(self, trainer: Any, module: Any) -> dict[str, float]:
            def watch(*args: Any) -> None:
                passes.append(torch.is_autocast_enabled("cpu"))

            handle = module.gpt.blocks[0].register_forward_hook(watch)
            values = super()._evaluate(trainer, module)
            handle.remove()
            return values

    module = MoEGPTModule(CONFIG, activation_checkpointing=True)
    callback = Watching(["tiny_word", "tiny_answer"], 2, every_n_steps=1, include_path=str(folder))
    trainer(tmp_path, callback, max_steps=1, precision="bf16-mixed").fit(module, TokenizedData())
    assert len(passes) > 2 and all(passes)
    assert module.gpt.activation_checkpointing


def test_metrics_are_logged_beside_the_others(folder: Path, tmp_path: Path) -> None:
    zero_shot = Counting(["tiny_choice", "tiny_answer"], 3, every_n_tokens=100, include_path=str(folder))
    logger = CSVLogger(tmp_path, name="", version="")
    settings = {"max_steps": 4, "logger": logger, "log_every_n_steps": 1, **VALIDATES}
    run = trainer(tmp_path, zero_shot, SaveAt(3, tmp_path / "a.ckpt"), **settings)
    run.fit(MoEGPTModule(CONFIG), TokenizedData())
    assert zero_shot.at == [2, 4]  # 64 tokens a step: at 128 and 256
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    logged = [row[header.index("step")] for row in rows if row[header.index("zero_shot/tiny_choice/acc")]]
    assert logged == ["1", "3"]
    assert {"zero_shot/tiny_answer/exact_match"} <= set(header)

    again = Counting(["tiny_choice"], 3, every_n_tokens=100, include_path=str(folder))
    trainer(tmp_path, again, max_steps=4).fit(MoEGPTModule(CONFIG), TokenizedData(), ckpt_path=tmp_path / "a.ckpt")
    assert again.at == [4]  # what was done before the checkpoint is not done again
    trainer(tmp_path, again, max_steps=4).fit(MoEGPTModule(CONFIG), TokenizedData())
    assert again.at == [4, 2, 4]  # of a second run

    alone = Counting(["tiny_choice"], 3, every_n_steps=5, include_path=str(folder))
    module = MoEGPTModule(CONFIG)
    (found,) = trainer(tmp_path, alone, limit_val_batches=1.0).validate(module, TokenizedData(), verbose=False)
    assert 0 <= found["zero_shot/tiny_choice/acc"] <= 1
    assert {"val/loss", "val/perplexity", "val/perplexity/odd"} <= set(found)


def test_a_failing_task_is_counted_and_training_goes_on(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    (folder / "tiny_choice_documents.jsonl").write_text('{"question": "no choices"}\n')
    settings = {"include_path": str(folder), "every_n_steps": 1, "limit": 2}
    run = trainer(tmp_path, zero_shot := ZeroShotEval(["tiny_choice", "tiny_word"], **settings), max_steps=2)
    logged: list[dict[str, float]] = []
    zero_shot._evaluate = lambda *args: logged.append(found := ZeroShotEval._evaluate(zero_shot, *args)) or found  # type: ignore
    with pytest.warns(UserWarning, match="ZeroShotEval: tiny_choice failed, and is left out: .*choices") as warned:
        run.fit(MoEGPTModule(CONFIG), TokenizedData())
    assert len([each for each in warned if "tiny_choice" in str(each.message)]) == 1
    assert run.global_step == 2
    assert [set(found) for found in logged] == [{"zero_shot/tiny_word/perplexity", "zero_shot/failed_tasks"}] * 2
    assert logged[1]["zero_shot/failed_tasks"] == 1


def test_mistakes_are_found_before_training(tmp_path: Path) -> None:
    for settings in ({"every_n_steps": 0}, {"limit": math.nan}, {"limit": 2.5}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* must be a whole number from 1"):
            ZeroShotEval(["piqa"], **settings)
    with pytest.raises(ValueError, match="include_path=nowhere is not a folder"):
        trainer(tmp_path, ZeroShotEval(["tiny_choice"], include_path="nowhere"), max_steps=1).fit(
            MoEGPTModule(CONFIG), TokenizedData()
        )
    with pytest.raises(ValueError, match="needs a data module with a tokenizer"):
        trainer(tmp_path, ZeroShotEval(["tiny_choice"]), max_steps=1).fit(MoEGPTModule(CONFIG), SyntheticData())
