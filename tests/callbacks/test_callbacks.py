"""Metrics and files of the callbacks, compared with numbers worked out by hand."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, LambdaCallback

from nlgmoe.callbacks import RunSummary, SampleText, TokenProgressBar
from nlgmoe.model.counting import count_parameters
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.token_schedule import SequenceCurriculum
from tests.support.synthetic import SyntheticData
from tests.support.trainers import CONFIG, SaveAt, trainer


def test_a_run_ends_with_a_summary(tmp_path: Path) -> None:
    run = trainer(tmp_path, RunSummary(), max_steps=6, limit_val_batches=1.0)
    run.fit(MoEGPTModule(CONFIG, curriculum=SequenceCurriculum(tokens=200, start=4, increment=4)), SyntheticData())
    summary = json.loads((tmp_path / "summary.json").read_text())
    count = count_parameters(CONFIG)
    assert summary["steps"] == 6 and summary["tokens"] < 6 * 64  # the curriculum cuts sequences off
    assert summary["tokens_per_second"] * summary["step_seconds"] == pytest.approx(summary["tokens"])
    assert (summary["params_total"], summary["params_active"]) == (count.total, count.active)
    assert math.isfinite(summary["train_loss"])
    assert summary["peak_memory_bytes"] > 50e6 and summary["wall_seconds"] > 0
    assert 0 < summary["validation_seconds"] < summary["wall_seconds"] - summary["step_seconds"]
    assert summary["versions"]["torch"]


def test_the_summary_has_the_validation_loss_and_continues_when_resumed(tmp_path: Path) -> None:
    validation = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    saves = SaveAt(3, tmp_path / "a.ckpt")
    trainer(tmp_path, RunSummary(), saves, max_steps=3, **validation).fit(MoEGPTModule(CONFIG), SyntheticData())
    second, module = RunSummary(), MoEGPTModule(CONFIG)
    there: list[bool] = []
    look = LambdaCallback(on_train_batch_end=lambda *_: there.append((tmp_path / "summary.json").exists()))
    run = trainer(tmp_path, second, look, max_steps=4, **validation)
    run.fit(module, SyntheticData(), ckpt_path=tmp_path / "a.ckpt")
    assert there == [False]  # that of the first part is gone until the second one ends
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tokens"] == 4 * 64
    assert summary["val_loss"] == float(run.callback_metrics["val/loss"])
    assert set(summary["bits_per_byte"]) == {"all", "even", "odd"}
    assert len(second._losses) == 4  # three of the first part, one of the second
    assert summary["tokens_per_second"] * summary["step_seconds"] == pytest.approx(summary["tokens"])


def test_an_interrupted_fit_goes_on_in_the_same_process(tmp_path: Path) -> None:
    """In training mode, with each step once, as a notebook does after its user has stopped a cell."""
    steps: list[tuple[int, int]] = []

    def look(trainer: Trainer, *_: Any) -> None:
        steps.append((trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped))

    def interrupt(*_: Any) -> None:
        if len(steps) == 4:
            raise ValueError("interrupted")

    def run(*callbacks: Callback) -> tuple[Trainer, MoEGPTModule, SyntheticData]:
        validation = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
        return trainer(tmp_path, *callbacks, max_steps=6, **validation), MoEGPTModule(CONFIG), SyntheticData()

    undisturbed, summary = RunSummary(), RunSummary()
    whole, *parts = run(undisturbed)
    whole.fit(*parts)
    notes = LambdaCallback(on_train_batch_start=look, on_validation_start=interrupt)
    part, *parts = run(notes, summary, SaveAt(3, tmp_path / "a.ckpt"))
    with pytest.raises(ValueError, match="interrupted"):
        part.fit(*parts)
    part.fit(*parts, ckpt_path=tmp_path / "a.ckpt")
    assert list(summary._losses) == pytest.approx(list(undisturbed._losses), rel=1e-6)
    assert steps == [(step, step) for step in (0, 1, 2, 3, 3, 4, 5)]


@pytest.mark.parametrize("limit", [1, 1.0])
def test_summary_has_no_unigram_entropy_for_a_part_of_the_validation(limit: float, tmp_path: Path) -> None:
    data = SyntheticData()
    data.unigram_entropy = lambda: 4.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, RunSummary(), max_steps=1, limit_val_batches=limit).fit(MoEGPTModule(CONFIG), data)
    assert sum("set data.max_eval_windows" in str(one.message) for one in caught) == isinstance(limit, int)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["val_loss"] and summary["unigram_entropy"] == (None if isinstance(limit, int) else 4.0)


def test_sample_texts_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SampleText needs the tokenizer of nlgmoe\.PileDataModule; remove it"):
        trainer(tmp_path, SampleText(["a"])).fit(MoEGPTModule(CONFIG), SyntheticData())


def test_progress_counts_tokens_to_the_end(tmp_path: Path) -> None:
    for tokens, steps, end in ((300, -1, 320), (None, 3, 192), (300, 3, 192)):
        bar, module = TokenProgressBar(), MoEGPTModule(CONFIG, train_tokens=tokens)
        trainer(tmp_path, bar, enable_progress_bar=True, max_steps=steps).fit(module, SyntheticData())
        shown = bar.train_progress_bar
        assert (shown.n, shown.total, shown.unit) == (end, end, " tok")
        assert set(bar.get_metrics(bar.trainer, module)) == {"loss", "lr"}
