"""A kill at any moment of writing or deleting leaves a valid checkpoint, and the newest valid one is chosen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nlgmoe.checkpoint import writing
from nlgmoe.checkpoint.newest import checkpoint_path, choose_checkpoint, find_checkpoint, saved_steps, set_link
from nlgmoe.checkpoint.portable import PortableCheckpointIO
from nlgmoe.checkpoint.verify import find_problems
from tests.checkpoint.runs import NEEDED, fit


def save(path: Path, value: float = 0.0) -> None:
    checkpoint = NEEDED | {"state_dict": {"model.x": torch.tensor([value])}, "global_step": 0, "tensor": torch.ones(2)}
    PortableCheckpointIO().save_checkpoint(checkpoint | {"optimizer_groups": []}, path)


def is_whole(path: Path) -> bool:
    """Both parts of two ranks, without a comparison of its tensors with the model's."""
    return not list(find_problems(path, rank=1, ranks=2)) and value_of(path) > 0


def value_of(path: Path) -> float:
    return float(PortableCheckpointIO().load_checkpoint(path)["state_dict"]["model.x"])


def killed_at(moment: int, action: Callable[[], None]) -> bool:
    """Run `action` in a child that dies at its n-th contact with the file system; whether it got that far."""
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == moment:
                    os._exit(9)
                return original(*args, **kwargs)

            return call

        for owner, name in [
            (Path, "rename"),
            (Path, "mkdir"),
            (Path, "unlink"),
            (Path, "write_bytes"),
            (Path, "write_text"),
            (os, "fsync"),
            (os, "rmdir"),
            (os, "unlink"),
            (writing, "save_file"),
        ]:
            setattr(owner, name, dying(getattr(owner, name)))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_checkpoint_is_read_whole_though_its_run_moves_the_link(tmp_path: Path) -> None:
    for step in (1, 2):
        save(checkpoint_path(tmp_path, step), float(step))
    set_link(tmp_path, "last", 1)
    link = tmp_path / "checkpoints/last.ckpt"
    for find in (find_checkpoint, choose_checkpoint):
        assert find(link) == checkpoint_path(tmp_path, 1)
    set_link(tmp_path, "last", 2)
    assert find_checkpoint(link) == checkpoint_path(tmp_path, 2)


def test_a_kill_at_any_moment_of_writing_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    moment, seen = 0, set()
    while True:
        moment += 1
        run = tmp_path / str(moment)
        run.mkdir()
        save(run / "last.ckpt", 1.0)
        if not killed_at(moment, lambda run=run: save(run / "last.ckpt", 2.0)):  # type: ignore[misc]
            break
        for path in run.iterdir():  # a name without a dot in front means a whole checkpoint
            assert path.name.startswith(".last.ckpt.") or is_whole(path)
        writing.recover_one(run / "last.ckpt")
        assert not [path for path in run.iterdir() if path.name.startswith(".")]
        seen |= {value_of(path) for path in run.iterdir()}
    assert seen == {1.0, 2.0}
    assert moment > 8
    assert value_of(run / "last.ckpt") == 2.0


def test_a_kill_at_any_moment_of_deleting_leaves_all_or_nothing(tmp_path: Path) -> None:
    moment = 0
    while True:
        moment += 1
        run = tmp_path / str(moment)
        run.mkdir()
        save(run / "a.ckpt", 1.0)
        if not killed_at(moment, lambda run=run: PortableCheckpointIO().remove_checkpoint(run / "a.ckpt")):  # type: ignore[misc]
            break
        writing.recover_one(run / "a.ckpt")
        assert all(is_whole(path) for path in run.iterdir())
    assert moment > 3
    assert not list(run.iterdir())


def test_another_process_that_is_writing_is_left_alone(tmp_path: Path) -> None:
    busy, dead = tmp_path / f".a.ckpt.writing-{os.getppid()}", tmp_path / ".a.ckpt.writing-4194305"
    for folder in (busy, dead, tmp_path / ".other"):
        folder.mkdir()
    writing.recover_one(tmp_path / "a.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [busy.name, ".other"]


def test_the_newest_valid_checkpoint_has_the_highest_number(tmp_path: Path) -> None:
    trainer = fit(tmp_path, steps=1)
    for step in (10, 9, 100, 20):
        trainer.save_checkpoint(checkpoint_path(tmp_path, step))
    set_link(tmp_path, "last", 100)
    (tmp_path / "checkpoints/model_checkpoint").mkdir()  # of another callback
    (tmp_path / "checkpoints/step-300.ckpt.damaged").mkdir()
    assert saved_steps(tmp_path) == [9, 10, 20, 100]
    assert choose_checkpoint(tmp_path) == checkpoint_path(tmp_path, 100)
    (checkpoint_path(tmp_path, 100) / "manifest.json").unlink()
    file = checkpoint_path(tmp_path, 20) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.warns(UserWarning, match="skipping a checkpoint that cannot be used") as warned:
        assert choose_checkpoint(tmp_path) == checkpoint_path(tmp_path, 10)
    skipped = [str(w.message) for w in warned if "skipping" in str(w.message)]
    assert "has no manifest.json" in skipped[0] and "is damaged" in skipped[1] and len(skipped) == 2
    for step in (9, 10):
        (checkpoint_path(tmp_path, step) / "manifest.json").unlink()
    with (
        pytest.warns(UserWarning, match="skipping"),
        pytest.raises(ValueError, match=r"no valid checkpoint in .* has no manifest.json.*; start a new run"),
    ):
        choose_checkpoint(tmp_path)


def test_a_link_is_replaced_in_one_call_and_follows_a_run_that_is_moved(tmp_path: Path) -> None:
    for step in (1, 2):
        save(checkpoint_path(tmp_path / "run", step), float(step))
        set_link(tmp_path / "run", "last", step)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert value_of(tmp_path / "moved/checkpoints/last.ckpt") == 2.0
    set_link(tmp_path / "moved", "last", None)
    set_link(tmp_path / "moved", "last", None)
    assert sorted(os.listdir(tmp_path / "moved/checkpoints")) == ["step-1.ckpt", "step-2.ckpt"]


def test_a_folder_for_transformers_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a folder for transformers; make a checkpoint of it with nlgmoe import"):
        choose_checkpoint(tmp_path)
