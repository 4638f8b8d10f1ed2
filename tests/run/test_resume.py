"""A run that is killed, told to stop or ended, and then resumed, equals the undisturbed one bit for bit."""

import os
import re
import shutil
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback

from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.run_checkpoints import checkpoint_path, saved_steps
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.config import MoEConfig
from nlgmoe.run.checks import warn_of_another_size
from tests.support.run_folders import SETTINGS, Send, assert_equal, fit, in_process, make_trainer, module, outcome, run
from tests.support.synthetic import SyntheticData

KILLS = {"saves before validations": 4, "saves by steps alone": 2}  # of each of the others: 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """For the name of settings: the outcome, its step, and the number of file-system calls in the run folder."""
    known: dict[str, tuple[dict[str, Any], int, int]] = {}

    def of(name: str) -> tuple[dict[str, Any], int, int]:
        if name not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            calls = in_process(lambda: run(folder, **SETTINGS[name]), folder=folder)
            step = saved_steps(folder)[-1]
            known[name] = outcome(folder, step), step, calls
        return known[name]

    return of


@pytest.mark.parametrize(("name", "part"), [(name, part) for name in SETTINGS for part in range(KILLS.get(name, 1))])
def test_a_run_killed_at_any_call_and_resumed_is_the_undisturbed_one(
    name: str, part: int, undisturbed: Any, tmp_path: Path
) -> None:
    expected, step, calls = undisturbed(name)
    assert calls > 50
    kill_at = round((part + 0.7) / KILLS.get(name, 1) * calls)  # `tests/faults` kills at every call
    assert in_process(lambda: run(tmp_path, **SETTINGS[name]), kill_at, tmp_path) == -9
    assert in_process(lambda: run(tmp_path, **SETTINGS[name])) == 0
    assert_equal(outcome(tmp_path, step), expected)


@pytest.mark.parametrize(
    ("hook", "step", "saved", "number"),
    [
        ("on_before_backward", 5, 6, signal.SIGTERM),
        ("on_before_backward", 5, 6, signal.SIGUSR1),
        ("on_train_batch_end", 6, 7, signal.SIGINT),  # read at the end of the next step
        ("on_validation_batch_start", 4, 4, signal.SIGTERM),
        ("on_validation_end", 8, 9, signal.SIGTERM),  # after the last time that a validation reads it
        ("on_before_backward", 9, 10, signal.SIGTERM),  # the last step
        ("on_validation_batch_start", 10, 10, signal.SIGTERM),  # its validation
    ],
)
def test_a_signal_saves_and_ends_the_run_after_the_step(
    hook: str, step: int, saved: int, number: int, undisturbed: Any, tmp_path: Path
) -> None:
    expected, last, _ = undisturbed("saves before validations")
    assert in_process(lambda: run(tmp_path, Send(hook, step, number))) == 0
    assert saved_steps(tmp_path)[-1] == saved
    assert os.readlink(tmp_path / "checkpoints/last.ckpt") == f"step-{saved}.ckpt"
    assert not (tmp_path / "summary.json").exists()
    assert in_process(lambda: run(tmp_path, ckpt_path="last")) == 0
    assert_equal(outcome(tmp_path, last), expected)


def test_validation_without_a_save_before_it_runs_to_its_end_at_a_signal(undisturbed: Any, tmp_path: Path) -> None:
    settings = SETTINGS["saves by steps alone"]
    expected, last, _ = undisturbed("saves by steps alone")
    assert in_process(lambda: run(tmp_path, Send("on_validation_batch_start", 8, signal.SIGTERM), **settings)) == 0
    assert saved_steps(tmp_path) == [8]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 8 + 2  # the validation's row is there
    assert in_process(lambda: run(tmp_path, **settings)) == 0
    assert_equal(outcome(tmp_path, last), expected)


def test_a_finished_run_started_again_changes_nothing_and_goes_on_if_it_is_longer(
    undisturbed: Any, tmp_path: Path
) -> None:
    expected, step, _ = undisturbed("saves before validations")
    fit(tmp_path / "parts")
    with pytest.warns(UserWarning, match="it has taken trainer.max_steps=10; to go on, raise it"):
        fit(tmp_path / "parts")
    assert_equal(outcome(tmp_path / "parts", step), expected)
    for name in ("whole", "parts"):
        fit(tmp_path / name, max_steps=13)
    parts, whole = outcome(tmp_path / "parts", 13), outcome(tmp_path / "whole", 13)
    assert_equal(parts | {"files": []}, whole | {"files": []})  # it has kept step 10, and not 9


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_is_resumed(undisturbed: Any, tmp_path: Path) -> None:
    expected, step, _ = undisturbed("saves before validations")
    assert in_process(lambda: run(tmp_path, Send("on_before_backward", 8, signal.SIGTERM))) == 0
    assert saved_steps(tmp_path) == [8, 9]
    damaged = tmp_path / "checkpoints/step-9.ckpt.damaged"
    shutil.copytree(checkpoint_path(tmp_path, 9), damaged)  # as an earlier start may have left it
    with (checkpoint_path(tmp_path, 9) / "model.safetensors").open("rb+") as file:
        file.seek(-8, 2)
        file.write(b"damaged!")
    assert in_process(lambda: run(tmp_path)) == 0
    assert list(find_problems(Checkpoint(damaged)))
    shutil.rmtree(damaged)
    assert_equal(outcome(tmp_path, step), expected)


def test_a_run_whose_time_is_over_takes_no_step_when_it_is_resumed(tmp_path: Path) -> None:
    def wait(trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            trainer.callbacks[-1]._start_time["train"] -= 3600  # type: ignore[attr-defined]

    waits = LambdaCallback(on_train_batch_start=wait)
    for callbacks in ([waits], []):
        trainer = fit(tmp_path, *callbacks, max_time=timedelta(minutes=30))
        assert trainer.global_step == 6 and saved_steps(tmp_path)[-1] == 6


def test_a_resumed_run_warns_where_its_losses_depend_on_the_size_of_a_step(recwarn: pytest.WarningsRecorder) -> None:
    before = {"samples": 8, "ranks": 2, "micro_batches": 1}
    one_rank, larger = before | {"ranks": 1, "micro_batches": 2}, before | {"samples": 12}
    for now, moe, words in (
        (before, MoEConfig(aux_scope="global"), ""),
        (one_rank, MoEConfig(), ""),
        (one_rank, MoEConfig(aux_scope="global"), "over 1 ranks together, and did over 2"),
        (larger, MoEConfig(), "a step had 8 sequences .*, now it has 12; data.global_batch_size and"),
    ):
        warn_of_another_size(before, now, moe)
        assert len(recwarn) == bool(words)
        assert not words or re.search(words, str(recwarn.pop().message))


def test_a_run_resumed_with_another_micro_batch_says_so(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=2)
    trainer = make_trainer(tmp_path, save={}, max_steps=4, accumulate_grad_batches=1)
    with pytest.warns(UserWarning, match="a step had 2 micro-batches over all ranks .*, now it has 1: each has"):
        trainer.fit(module(), datamodule=SyntheticData(micro_batch_size=8), ckpt_path="last")
