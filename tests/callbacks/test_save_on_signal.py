"""SaveOnSignal on one process: the saved checkpoint, the exit code, and that a resumed run equals an uninterrupted one."""

import csv
import json
import os
import signal
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from nlgmoe.callbacks import RunSummary, SaveOnSignal, save_on_signal
from nlgmoe.checkpoint.portable import read_document
from nlgmoe.module import MoEGPTModule
from nlgmoe.monitoring.loggers import RunCSVLogger
from nlgmoe.optim.token_schedule import LearningRateSchedule
from tests.checkpoint.test_portable import ACCUMULATE, CONFIG, weights
from tests.synthetic import SyntheticData

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Send(Callback):
    """Sends signals to this process in a hook's call with this `batch_idx`."""

    def __init__(self, hook: str, batch_idx: int, *numbers: int) -> None:
        setattr(self, hook, self._send)
        self.hook, self.batch_idx, self.numbers = hook, batch_idx, numbers

    def _send(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        index = args[2] if self.hook == "on_train_batch_end" or self.hook == "on_validation_batch_end" else args[1]
        if index == self.batch_idx and (trainer.global_step == 4 or trainer.training):  # in the first validation
            for number in self.numbers:
                os.kill(os.getpid(), number)


def fit(root: Path, *callbacks: Callback, steps: int = 8, resume: Path | None = None, **settings: Any) -> Trainer:
    """Validates after steps 4 and 8, and logs everything."""
    trainer = Trainer(
        default_root_dir=root,
        callbacks=[SaveOnSignal(), *callbacks],
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=ACCUMULATE,
        accelerator="cpu",
        logger=RunCSVLogger(root),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=4 * ACCUMULATE,
        check_val_every_n_epoch=None,
        **settings,
    )
    schedule = LearningRateSchedule("cosine", min_lr=1e-5, decay_tokens=1950)  # rounding matters here
    trainer.fit(MoEGPTModule(CONFIG, schedule=schedule), SyntheticData(), ckpt_path=resume)
    return trainer


def keeper(root: Path, **settings: Any) -> ModelCheckpoint:
    """Saves after each validation, unless `settings` say otherwise."""
    usual = {"monitor": "val/loss", "save_last": True, "enable_version_counter": False}
    return ModelCheckpoint(root / "kept", **{**usual, **settings})


def stopped(root: Path, *callbacks: Callback, **settings: Any) -> int:
    """The exit code."""
    with pytest.raises(SystemExit) as end:
        fit(root, *callbacks, **settings)
    assert isinstance(end.value.code, int)
    return end.value.code


def logged(root: Path) -> list[dict[str, str]]:
    """The rows of `metrics.csv`, once where a resumed run has repeated a validation."""
    with (root / "metrics.csv").open() as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row, _ in groupby(rows)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], dict[str, torch.Tensor]]:
    root = tmp_path_factory.mktemp("undisturbed")
    trainer = fit(root, keeper(root))
    return logged(root), weights(trainer)


@pytest.mark.parametrize(
    ("hook", "batch_idx", "step"),
    [
        ("on_train_batch_start", 4, 2),  # the second micro-batch of step 2
        ("on_train_batch_end", 5, 3),  # step 2 is over
        ("on_train_batch_start", 11, 4),  # the last one before a validation
        ("on_validation_batch_start", 1, 4),
        ("on_validation_batch_start", 2, 4),  # its last batch
        ("on_train_batch_end", 12, 5),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    hook: str, batch_idx: int, step: int, undisturbed: Any, tmp_path: Path
) -> None:
    assert stopped(tmp_path, keeper(tmp_path), RunSummary(), Send(hook, batch_idx, signal.SIGTERM)) == 0
    assert read_document(tmp_path / "kept" / "last.ckpt")["global_step"] == step
    assert not (tmp_path / "summary.json").exists()
    rows, final = undisturbed
    assert logged(tmp_path) == rows[: len(logged(tmp_path))]
    assert int(logged(tmp_path)[-1]["step"]) == step - 1

    trainer = fit(tmp_path, keeper(tmp_path), resume=tmp_path / "kept" / "last.ckpt")
    assert logged(tmp_path) == rows
    assert all(torch.equal(value, final[name]) for name, value in weights(trainer).items())


class Average(Callback):
    """Validates with other weights than it trains."""

    def __init__(self) -> None:
        self.trained: list[torch.Tensor] = []

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.trained = [parameter.clone() for parameter in pl_module.parameters()]
        for parameter in pl_module.parameters():
            parameter.mul_(1 - 2**-7)

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        for parameter, trained in zip(pl_module.parameters(), self.trained, strict=True):
            parameter.copy_(trained)


@pytest.mark.parametrize(
    ("hook", "batch_idx", "precision"),
    [
        ("on_train_batch_start", 11, "32-true"),
        ("on_validation_batch_start", 1, "bf16-true"),
        ("on_validation_batch_end", 2, "32-true"),
    ],
)
def test_weights_of_a_validation_alone_are_not_saved(hook: str, batch_idx: int, precision: Any, tmp_path: Path) -> None:
    """The validation runs to its end, and the run ends then; a run that fails in it saves nothing."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    final = weights(fit(whole, Average(), keeper(whole), precision=precision))
    stop = Send(hook, batch_idx, signal.SIGTERM)
    assert stopped(run, Average(), keeper(run), stop, precision=precision) == 0
    trainer = fit(run, Average(), keeper(run), resume=run / "kept/last.ckpt", precision=precision)
    assert all(torch.equal(value, final[name]) for name, value in weights(trainer).items())
    assert logged(run) == logged(whole)
    failed = tmp_path / "failed"
    with pytest.raises(KeyError):
        fit(failed, Average(), keeper(failed, save_on_exception=True), Crash(4), precision=precision)
    assert not (failed / "kept").exists()


@pytest.mark.parametrize("settings", [{}, {"monitor": None, "every_n_train_steps": 4}], ids=["after", "before"])
def test_an_interrupted_validation_is_repeated_once(settings: dict[str, Any], undisturbed: Any, tmp_path: Path) -> None:
    """Also where a ModelCheckpoint has saved just before it."""
    stop = Send("on_validation_batch_start", 1, signal.SIGTERM)
    assert stopped(tmp_path, keeper(tmp_path, **settings), stop) == 0
    for steps in (8, 9):
        fit(tmp_path, keeper(tmp_path, **settings), steps=steps, resume=tmp_path / "kept" / "last.ckpt")
    assert logged(tmp_path)[:-2] == undisturbed[0]
    assert [row["step"] for row in logged(tmp_path)[-2:]] == ["8", "8"]  # trained, and validated as its end


class Crash(Callback):
    """Ends the process in the validation of a step, as SIGKILL does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError(f"killed at {self.step}")


def test_a_validation_interrupted_by_a_crash_is_repeated(undisturbed: Any, tmp_path: Path) -> None:
    """Also the last one of a run by `max_steps`. It counts once, also where it had ended after the checkpoint was saved."""

    def go_on(*callbacks: Callback, resume: bool = True) -> tuple[ModelCheckpoint, EarlyStopping]:
        best, stopper = keeper(tmp_path, save_last=False), EarlyStopping("val/loss", min_delta=100, patience=9)
        every = ModelCheckpoint(tmp_path, "all", every_n_train_steps=4, save_on_exception=True)
        every._enable_version_counter = False
        fit(tmp_path, stopper, best, every, RunSummary(), *callbacks, resume=tmp_path / "all.ckpt" if resume else None)
        return best, stopper

    for step in (4, 8):
        with pytest.raises(KeyError, match=f"killed at {step}"):
            go_on(Crash(step), resume=step > 4)
    for _ in range(2):  # the checkpoint of step 8 is from before its validation
        best, stopper = go_on()
        assert logged(tmp_path) == undisturbed[0]
        assert (best.best_model_path, stopper.wait_count) == (str(tmp_path / "kept" / "epoch=0-step=8.ckpt"), 1)
    assert float(undisturbed[0][-1]["val/loss"]) == json.loads((tmp_path / "summary.json").read_text())["val_loss"]


def test_a_run_at_its_end_is_saved_and_finishes(undisturbed: Any, tmp_path: Path) -> None:
    fit(tmp_path, keeper(tmp_path), RunSummary(), Send("on_train_batch_start", 23, signal.SIGTERM))
    assert logged(tmp_path) == undisturbed[0]
    assert (tmp_path / "summary.json").exists()
    assert read_document(tmp_path / "kept" / "last.ckpt")["global_step"] == 8


def test_a_second_press_of_ctrl_c_ends_at_once_but_one_that_arrives_twice_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    twice = Send("on_train_batch_start", 4, signal.SIGINT, signal.SIGINT)
    monkeypatch.setattr(save_on_signal, "SAME_PRESS_SECONDS", 1e9)
    assert stopped(tmp_path / "once", twice) == 0
    assert capfd.readouterr().err.count("press it again") == 1
    assert (tmp_path / "once" / "checkpoints" / "last.ckpt").exists()
    monkeypatch.setattr(save_on_signal, "SAME_PRESS_SECONDS", -1.0)
    try:
        assert stopped(tmp_path / "twice", twice) == 1  # Lightning's; train.py says 130
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores Ctrl+C from here on
    assert not any((tmp_path / "twice").rglob("*.ckpt"))


def test_without_checkpointing_the_exit_code_is_the_signals(tmp_path: Path) -> None:
    stop = Send("on_train_batch_start", 0, signal.SIGUSR1)
    assert stopped(tmp_path, stop, enable_checkpointing=False) == 128 + signal.SIGUSR1
    assert not any(tmp_path.rglob("*.ckpt"))


def test_handlers_are_those_from_before_once_training_is_over(tmp_path: Path) -> None:
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append([signal.getsignal(number) for number in SIGNALS])

    before = [signal.getsignal(number) for number in SIGNALS]
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as under `nohup`, for its signal
    try:
        trainer = fit(tmp_path / "ends", Look(), steps=1)
        assert [signal.getsignal(number) for number in SIGNALS] == [before[0], signal.SIG_IGN, before[2]]
    finally:
        signal.signal(signal.SIGUSR1, before[1])
    ours = seen[-1]
    assert ours[0] == ours[2] not in before and ours[1] == signal.SIG_IGN
    # Lightning looks after a validation itself.
    assert "register_signal_handlers" not in vars(trainer._signal_connector)

    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("a failure")

    with pytest.raises(RuntimeError, match="a failure"):
        fit(tmp_path / "fails", Fails())
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("save_last", [True, "link", None])
def test_what_a_model_checkpoint_has_just_saved_is_not_saved_again(
    save_last: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    every = {"save_last": save_last, "monitor": None, "every_n_train_steps": 2, "filename": "step-{step}"}
    stop = Send("on_train_batch_start", 4, signal.SIGTERM)
    assert stopped(tmp_path, keeper(tmp_path, **every), stop) == 0
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == ({"step-step=2.ckpt", "last.ckpt"} if save_last else {"step-step=2.ckpt"})
    # One step later there is something to save: over the link, over the folder, or beside what is there.
    goes_on = Send("on_train_batch_start", 6, signal.SIGTERM)
    (newest,) = {path.resolve() for path in (tmp_path / "kept").iterdir() if path.name == "step-step=2.ckpt"}
    assert stopped(tmp_path, keeper(tmp_path, **every), goes_on, resume=newest) == 0
    assert read_document(tmp_path / "kept" / "last.ckpt")["global_step"] == 3
    assert read_document(newest)["global_step"] == 2
    assert "resume with --ckpt_path last" in caplog.text


@pytest.mark.parametrize("succeeds", [True, False])
def test_slurm_requeues_the_job_after_its_requeue_signal(
    succeeds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/said\nexit {0 if succeeds else 1}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.setenv(name, "12345")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    slurm = {"plugins": SLURMEnvironment(requeue_signal=signal.SIGUSR2)}
    for number in (signal.SIGUSR2, signal.SIGTERM):
        stop = Send("on_train_batch_start", 0, number)
        assert stopped(tmp_path / f"run {number}", stop, **slurm) == 0
        assert any((tmp_path / f"run {number}").rglob("last.ckpt"))
        assert (tmp_path / "said").read_text() == "requeue 12345_7\n"
