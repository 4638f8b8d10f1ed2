"""A kill at any moment of writing or deleting leaves a valid checkpoint, and the newest valid one is chosen."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from nlgmoe.checkpoint.portable import PortableCheckpointIO
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.run_checkpoints import checkpoint_path, choose_checkpoint, find_checkpoint, saved_steps, set_link
from nlgmoe.checkpoint.verify import find_problems
from tests.checkpoint.runs import fit, small_checkpoint, value_of
from tests.support.run_folders import in_process


def save(path: Path, value: float = 0.0) -> None:
    PortableCheckpointIO().save_checkpoint(small_checkpoint(value, tensor=torch.ones(2), optimizer_groups=[]), path)


def test_a_link_is_replaced_in_one_call_and_follows_a_run_that_is_moved(tmp_path: Path) -> None:
    for step in (1, 2):
        save(checkpoint_path(tmp_path / "run", step), float(step))
    set_link(tmp_path / "run", "last", 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    link = tmp_path / "moved/checkpoints/last.ckpt"
    for find in (find_checkpoint, choose_checkpoint):
        assert find(link).path == checkpoint_path(tmp_path / "moved", 1)  # whatever the link names later
    set_link(tmp_path / "moved", "last", 2)
    assert value_of(link) == 2.0
    set_link(tmp_path / "moved", "last", None)
    assert not link.is_symlink()


@pytest.mark.parametrize(
    ("action", "left"),
    [(lambda path: save(path, 2.0), {1.0, 2.0}), (lambda path: PortableCheckpointIO().remove_checkpoint(path), {1.0})],
    ids=["writing", "deleting"],
)
def test_a_kill_at_any_call_leaves_whole_checkpoints_alone(
    action: Callable[[Path], None], left: set[float], tmp_path: Path
) -> None:
    values, moment, code = set(), 0, -9
    while code == -9:
        moment += 1
        run = tmp_path / str(moment)
        save(run / "a.ckpt", 1.0)
        code = in_process(partial(action, run / "a.ckpt"), moment, run)
        for path in run.iterdir():  # a name without a dot in front means a whole checkpoint
            assert path.name.startswith(".a.ckpt.") or (
                not list(find_problems(Checkpoint(path))) and value_of(path) > 0
            )
        values |= {value_of(path) for path in run.glob("a.ckpt")}
        save(run / "a.ckpt")
        action(run / "a.ckpt")
        assert {path.name for path in run.iterdir()} <= {"a.ckpt"}  # nothing is left of the killed process
    assert code == 0 and moment > 3 and values == left


def test_the_newest_valid_checkpoint_has_the_highest_number(tmp_path: Path) -> None:
    trainer = fit(tmp_path, steps=1)
    for step in (10, 9, 100, 20):
        trainer.save_checkpoint(checkpoint_path(tmp_path, step))
    set_link(tmp_path, "last", 100)
    (tmp_path / "checkpoints/model_checkpoint").mkdir()  # of another callback
    (tmp_path / "checkpoints/step-300.ckpt.damaged").mkdir()
    assert saved_steps(tmp_path) == [9, 10, 20, 100]
    assert choose_checkpoint(tmp_path).path == checkpoint_path(tmp_path, 100)
    (checkpoint_path(tmp_path, 100) / "optimizer.safetensors").write_bytes(b"damaged")
    assert find_checkpoint(tmp_path).path == checkpoint_path(tmp_path, 100)  # readers of weights read no more
    (checkpoint_path(tmp_path, 100) / "manifest.json").unlink()
    file = checkpoint_path(tmp_path, 20) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.warns(UserWarning, match="skipping a checkpoint that cannot be used") as warned:
        assert choose_checkpoint(tmp_path).path == checkpoint_path(tmp_path, 10)
    skipped = [str(w.message) for w in warned if "skipping" in str(w.message)]
    assert "has no manifest.json" in skipped[0] and "is damaged" in skipped[1] and len(skipped) == 2
    for step in (9, 10):
        (checkpoint_path(tmp_path, step) / "manifest.json").unlink()
    with (
        pytest.warns(UserWarning, match="skipping"),
        pytest.raises(ValueError, match=r"no valid checkpoint in .* has no manifest.json.*; start a new run"),
    ):
        choose_checkpoint(tmp_path)
