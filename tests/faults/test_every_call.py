"""A run that is killed at any of its calls to the file system, and resumed, is the undisturbed one, bit for bit."""

import shutil
from pathlib import Path

import pytest

from nlgmoe.checkpoint.run_checkpoints import saved_steps
from tests.support.run_folders import SETTINGS, assert_equal, in_process, outcome, run


@pytest.mark.parametrize("name", ["saves before validations", "saves by steps alone", "milestones"])
def test_a_kill_at_every_call_changes_nothing(name: str, tmp_path: Path) -> None:
    settings, whole, killed = SETTINGS[name], tmp_path / "whole", tmp_path / "killed"
    calls = in_process(lambda: run(whole, **settings), folder=whole)
    step = saved_steps(whole)[-1]
    expected = outcome(whole, step)
    assert calls > 50
    for call in range(1, calls + 1):
        assert in_process(lambda: run(killed, **settings), call, killed) == -9
        assert in_process(lambda: run(killed, **settings)) == 0, call
        assert_equal(outcome(killed, step), expected)
        shutil.rmtree(killed)
