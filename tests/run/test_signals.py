"""Signals on one process: exit codes, a second Ctrl+C, handlers, and Slurm. `test_resume.py` has the resumed run."""

import signal
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment

from nlgmoe.run import signals
from nlgmoe.run.signals import StopOnSignal
from tests.support.run_folders import Send, fit

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def stopped(folder: Path, *callbacks: Callback, **settings: Any) -> int:
    with pytest.raises(SystemExit) as end:
        fit(folder, *callbacks, **settings)
    assert isinstance(end.value.code, int)
    return end.value.code


def test_second_ctrl_c_ends_at_once_but_one_that_arrives_twice_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def twice() -> Send:
        return Send("on_before_backward", 1, signal.SIGINT, signal.SIGINT)

    monkeypatch.setattr(signals, "SAME_PRESS_SECONDS", 1e9)
    assert stopped(tmp_path / "once", twice()) == 0
    assert capfd.readouterr().err.count("press it again") == 1
    assert (tmp_path / "once/checkpoints/step-2.ckpt").exists()
    monkeypatch.setattr(signals, "SAME_PRESS_SECONDS", -1.0)
    try:
        assert stopped(tmp_path / "twice", twice()) == 1  # Lightning's; train.py says 130
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores Ctrl+C from here on
    assert not any((tmp_path / "twice").rglob("step-*.ckpt"))


def test_exit_code_without_checkpointing_is_the_signals(tmp_path: Path) -> None:
    stop = Send("on_before_backward", 0, signal.SIGUSR1)
    assert stopped(tmp_path, StopOnSignal(), stop, save=None) == 128 + signal.SIGUSR1
    assert not any(tmp_path.rglob("*.ckpt"))


def test_signal_handlers_are_restored_after_training(tmp_path: Path) -> None:
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append([signal.getsignal(number) for number in SIGNALS])

    before = [signal.getsignal(number) for number in SIGNALS]
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as under `nohup`, for its signal
    try:
        fit(tmp_path / "ends", Look(), max_steps=1)
        assert [signal.getsignal(number) for number in SIGNALS] == [before[0], signal.SIG_IGN, before[2]]
    finally:
        signal.signal(signal.SIGUSR1, before[1])
    ours = seen[-1]
    assert ours[0] == ours[2] not in before and ours[1] == signal.SIG_IGN

    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("a failure")

    with pytest.raises(RuntimeError, match="a failure"):
        fit(tmp_path / "fails", Fails())
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("succeeds", [True, False])
def test_slurm_requeues_the_job_after_its_requeue_signal(
    succeeds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if SIGTERM follows it in the same step, as Slurm sends it; not after SIGTERM alone."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/said\nexit {0 if succeeds else 1}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.setenv(name, "12345")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    slurm = {"plugins": SLURMEnvironment(requeue_signal=signal.SIGUSR2)}
    said = []
    for numbers in ([signal.SIGTERM], [signal.SIGUSR2, signal.SIGTERM]):
        run = tmp_path / f"run {len(numbers)}"
        assert stopped(run, Send("on_before_backward", 0, *numbers), **slurm) == 0
        assert (run / "checkpoints/step-1.ckpt").exists()
        said.append((tmp_path / "said").read_text() if (tmp_path / "said").exists() else "")
    assert said == ["", "requeue 12345_7\n"]
