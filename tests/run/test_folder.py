"""One rule for the run folder: it is one line of steps."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.run_checkpoints import checkpoint_path, saved_steps
from nlgmoe.run import trainer as trainer_module
from tests.support.run_folders import Send, assert_equal, fit, in_process, make_trainer, module, outcome
from tests.support.synthetic import SyntheticData


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended")
    fit(folder)
    return folder


def test_run_folder_with_checkpoints_resumes_its_newest_one_alone(ended: Path) -> None:
    before = (ended / "metrics.csv").read_bytes()
    for path, words in (
        (None, r"has a run with checkpoints up to step 10: resume it with ckpt_path=last, or choose another folder"),
        (checkpoint_path(ended, 9), r"is not the newest checkpoint of .* which is of step 10: resume that with"),
    ):
        with pytest.raises(ValueError, match=words):
            fit(ended, ckpt_path=path, max_steps=12)
    assert (ended / "metrics.csv").read_bytes() == before
    for path in ("last", "auto", ended, ended / "checkpoints/last.ckpt"):
        assert fit(ended, ckpt_path=path).global_step == 10


def test_run_folder_takes_a_new_run_only_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ckpt_path=last: there is no checkpoint in .*; leave ckpt_path out to start"):
        fit(tmp_path, ckpt_path="last")
    assert fit(tmp_path, max_steps=2, ckpt_path=None).global_step == 2


def test_a_run_killed_before_its_first_checkpoint_starts_again(ended: Path, tmp_path: Path) -> None:
    assert in_process(lambda: fit(tmp_path, Send("on_before_backward", 2, signal.SIGKILL))) == -9
    assert (tmp_path / "config.yaml").exists() and not saved_steps(tmp_path)
    leftover, own = tmp_path / "checkpoints/.step-1.ckpt.writing", tmp_path / "checkpoints/.gitignore"
    leftover.mkdir(parents=True)
    own.write_text("*")
    assert in_process(lambda: fit(tmp_path)) == 0
    assert not leftover.exists()
    own.unlink()  # it is still there
    assert_equal(outcome(tmp_path), outcome(ended))


def test_a_fork_is_a_new_run_that_saves_its_starting_step_first(ended: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    source = checkpoint_path(ended, 9)
    assert in_process(lambda: fit(fork, Send("on_before_backward", 9, signal.SIGKILL), ckpt_path=source)) == -9
    assert saved_steps(fork) == [9]
    with pytest.raises(ValueError, match="is not the newest checkpoint of"):  # a job that is requeued needs auto
        fit(fork, ckpt_path=checkpoint_path(ended, 10))
    fit(fork)
    found, expected = outcome(fork), outcome(ended)
    assert all(torch.equal(value, expected["tensors"][name]) for name, value in found["tensors"].items())
    assert found["metrics.csv"].splitlines()[-2:] == expected["metrics.csv"].splitlines()[-2:]
    rows = len(found["metrics.csv"].splitlines()) - 2  # without the header and the last one, of its validation
    assert Checkpoint(checkpoint_path(fork, 10)).document["rows"] == rows


def test_run_folder_refuses_a_second_process_while_one_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / ".run.lock"), pytest.raises(ValueError, match="another process trains in "):
        fit(tmp_path)
    fit(tmp_path, max_steps=1)


def test_an_evaluation_touches_neither_tables_nor_lock(ended: Path) -> None:
    files = {file: file.read_bytes() for file in ended.rglob("*") if file.is_file()}
    losses = set()
    with FileLock(ended / ".run.lock"):
        for path in ("last", "best", checkpoint_path(ended, 10), ended):
            run = make_trainer(ended, save={})
            losses |= {run.validate(module(), datamodule=SyntheticData(), ckpt_path=path)[0]["val/loss"]}
    assert len(losses) == 1
    assert files == {file: file.read_bytes() for file in ended.rglob("*") if file.is_file()}


def test_evaluation_names_what_it_cannot_evaluate(tmp_path: Path) -> None:
    for name, words in {"last": "has no checkpoint", "best": "no best checkpoint yet", "a": "no checkpoint at"}.items():
        with pytest.raises(ValueError, match=words):
            make_trainer(tmp_path, save={}).validate(module(), datamodule=SyntheticData(), ckpt_path=name)
    other = make_trainer(tmp_path, ModelCheckpoint(tmp_path / "other"), enable_checkpointing=True)
    with pytest.raises(ValueError, match="no best checkpoint yet"):
        other.validate(module(), datamodule=SyntheticData(), ckpt_path="best")


@pytest.mark.parametrize("settings", [{"fast_dev_run": 2}, {"save": None}], ids=["fast_dev_run", "no checkpoints"])
def test_runs_without_checkpoints_need_no_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    for _ in range(2):
        fit(tmp_path, ckpt_path=None, **settings)
    run = make_trainer(tmp_path, **settings)
    with pytest.raises(MisconfigurationException, match="train_dataloader"):
        run.fit(module())  # without data
    assert run.default_root_dir == str(tmp_path)
    assert not (tmp_path / "checkpoints").exists() and ("save" in settings or not any(tmp_path.glob("*.csv")))


def test_a_plain_trainer_trains_saves_and_validates_without_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False)
    made = module()
    trainer.fit(made, datamodule=SyntheticData())
    (saved,) = (tmp_path / "checkpoints").glob("*.ckpt")  # Lightning's own
    loss = trainer.validate(made, datamodule=SyntheticData())[0]["val/loss"]
    assert trainer.validate(module(), datamodule=SyntheticData(), ckpt_path=saved)[0]["val/loss"] == loss
    assert os.listdir(tmp_path) == ["checkpoints"]
