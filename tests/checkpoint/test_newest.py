"""A kill at any moment leaves something to go on from, and what is newest and whole is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from nlgmoe.checkpoint import newest, portable, writing
from nlgmoe.checkpoint.folder import is_complete, is_of_run, read_document
from nlgmoe.checkpoint.newest import choose_checkpoint, find_checkpoint, has_checkpoints, list_checkpoints
from nlgmoe.checkpoint.portable import PortableCheckpointIO
from nlgmoe.validation import SettingError
from tests.checkpoint.runs import ACCUMULATE, NEEDED, SaveAt, fit
from tests.test_module import Recorder


def save(path: Path, value: float) -> None:
    checkpoint = NEEDED | {"state_dict": {"model.x": torch.tensor([value])}, "global_step": 0, "tensor": torch.ones(2)}
    PortableCheckpointIO().save_checkpoint(checkpoint | {"optimizer_groups": []}, path)


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


def test_an_empty_name_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "other.ckpt", 0.0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match="the name of a checkpoint or run folder is empty"):
        find_checkpoint("")


@pytest.mark.parametrize("before", ["nothing", "a folder", "a link"])
def test_a_kill_at_any_moment_of_writing_leaves_the_old_or_the_new_one(before: str, tmp_path: Path) -> None:
    moment, seen = 0, set()
    while True:
        moment += 1
        run = tmp_path / str(moment)
        run.mkdir()
        save(run / ("last.ckpt" if before == "a folder" else "step-1.ckpt"), 1.0)
        if before == "a link":
            (run / "last.ckpt").symlink_to("step-1.ckpt")
        if not killed_at(moment, lambda run=run: save(run / "last.ckpt", 2.0)):  # type: ignore[misc]
            break
        for path in run.iterdir():  # a name without a dot in front means a whole checkpoint
            assert path.name.startswith(".last.ckpt.") or is_complete(path)
        writing.recover(run)
        assert not [path for path in run.iterdir() if path.name.startswith(".")]
        seen.add(value_of(list_checkpoints(run)[0]))
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
        save(run / "b.ckpt", 2.0)
        if not killed_at(moment, lambda run=run: PortableCheckpointIO().remove_checkpoint(run / "a.ckpt")):  # type: ignore[misc]
            break
        writing.recover(run)
        assert all(is_complete(path) for path in run.iterdir())
        assert value_of(list_checkpoints(run)[0]) == 2.0
    assert moment > 3
    assert [path.name for path in run.iterdir()] == ["b.ckpt"]


def test_the_last_whole_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    for name, value in {"a.ckpt": 1.0, "b.ckpt": 2.0}.items():
        save(tmp_path / name, value)
    (tmp_path / "last.ckpt").symlink_to("a.ckpt")
    file = tmp_path / "b.ckpt" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"a\.ckpt is kept: no other checkpoint beside it is complete"):
        PortableCheckpointIO().remove_checkpoint(tmp_path / "a.ckpt")
    assert is_complete(tmp_path / "a.ckpt")
    weights_only = NEEDED | {"state_dict": {"model.x": torch.ones(1)}, "global_step": 1}
    PortableCheckpointIO().save_checkpoint(weights_only, tmp_path / "b.ckpt")
    with pytest.warns(UserWarning, match=r"a\.ckpt is kept"):  # nothing could be trained on from b
        PortableCheckpointIO().remove_checkpoint(tmp_path / "a.ckpt")
    save(tmp_path / "c.ckpt", 3.0)
    PortableCheckpointIO().remove_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


def test_another_process_that_is_writing_is_left_alone(tmp_path: Path) -> None:
    busy, dead = tmp_path / f".a.ckpt.writing-{os.getppid()}", tmp_path / ".b.ckpt.writing-4194305"
    for folder in (busy, dead, tmp_path / ".other"):
        folder.mkdir()
    writing.recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [busy.name, ".other"]


def test_a_run_goes_on_from_its_newest_valid_checkpoint(tmp_path: Path) -> None:
    undisturbed, resumed = Recorder(), Recorder()
    every = ModelCheckpoint(tmp_path / "all", "{step}", every_n_train_steps=2, save_top_k=-1, save_last="link")
    fit(tmp_path, undisturbed, every)
    (tmp_path / "all" / "step=8.ckpt" / "manifest.json").unlink()  # and so last.ckpt, which is a link to it
    file = tmp_path / "all" / "step=6.ckpt" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.warns(UserWarning, match="skipping a checkpoint that cannot be used") as warned:
        fit(tmp_path, resumed, resume=tmp_path)
    skipped = [str(w.message) for w in warned if "skipping" in str(w.message)]
    assert "has no manifest.json" in skipped[0] and "is damaged" in skipped[1] and len(skipped) == 2
    assert resumed.losses == undisturbed.losses[4 * ACCUMULATE :]


def test_weights_alone_are_no_way_to_go_on(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_weights_only=True), steps=1)
    with (
        pytest.warns(UserWarning, match="holds weights only"),
        pytest.raises(ValueError, match=r"no valid checkpoint in .* \(step=1\.ckpt: .*\); start a new run"),
    ):
        choose_checkpoint(tmp_path)
    assert choose_checkpoint(tmp_path, to_train=False) == tmp_path / "step=1.ckpt"


def test_when_it_was_saved_decides_not_its_step(tmp_path: Path) -> None:
    """A run that went back to an earlier step has left later steps behind."""
    fit(tmp_path, SaveAt(18, tmp_path / "six.ckpt"), SaveAt(9, tmp_path / "three.ckpt"), steps=6)
    fit(tmp_path, SaveAt(12, tmp_path / "four.ckpt"), steps=4, resume=tmp_path / "three.ckpt")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["four.ckpt", "six.ckpt", "three.ckpt"]


def test_what_a_checkpoint_says_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reads(path: Path) -> dict[str, Any]:
        read.append(path.name)
        return read_document(path)

    save(tmp_path / "a.ckpt", 1.0)
    save(tmp_path / "b.ckpt", 2.0)
    monkeypatch.setattr(newest, "read_document", reads)
    monkeypatch.setattr(newest, "gather_problems", lambda path: [])
    assert choose_checkpoint(tmp_path) == tmp_path / "b.ckpt"
    assert sorted(read) == ["a.ckpt", "b.ckpt"]


def test_what_a_run_deletes_meanwhile_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint, once it is listed, and a folder."""

    def gone(path: Path) -> dict[str, Any]:
        if path.name == "a.ckpt":
            shutil.rmtree(path)
        return read_document(path)

    def is_dir(path: Path) -> bool:
        found = os.path.isdir(path)
        if path.name == "folder":
            path.rmdir()
        return found

    save(tmp_path / "a.ckpt", 1.0)
    save(tmp_path / "b.ckpt", 2.0)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(newest, "read_document", gone)
    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert list_checkpoints(tmp_path) == [tmp_path / "b.ckpt"]


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    save(tmp_path / "scratch" / "a.ckpt", 1.0)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    (run / "again").symlink_to(run)
    (run / "loop.ckpt").symlink_to(run / "loop.ckpt")
    assert has_checkpoints(run)
    assert [path.name for path in list_checkpoints(run)] == ["loop.ckpt", "a.ckpt"]
    (run / "loop.ckpt").unlink()
    (tmp_path / "scratch" / ".b.ckpt.writing-4194305").mkdir()
    writing.recover(run)
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["a.ckpt"]


def test_a_run_in_a_subfolder_keeps_its_checkpoints_to_itself(tmp_path: Path) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "lr1e-3"
    for run in (outer, inner):
        save(run / "checkpoints" / "last.ckpt", 1.0)
        (run / "config.yaml").touch()
    assert list_checkpoints(outer) == [outer / "checkpoints" / "last.ckpt"] and not has_checkpoints(tmp_path)
    assert is_of_run(outer / "checkpoints" / "last.ckpt", outer)
    assert not is_of_run(inner / "checkpoints" / "last.ckpt", outer) and not is_of_run(inner, outer)


def test_an_evaluation_leaves_a_run_alone_that_is_writing(tmp_path: Path) -> None:
    fit(tmp_path, SaveAt(3, tmp_path / "a.ckpt"), steps=1)
    leftover = tmp_path / ".a.ckpt.writing-4194305"  # of another host, for all that this one knows
    leftover.mkdir()
    choose_checkpoint(tmp_path, to_train=False)
    assert leftover.exists()
    choose_checkpoint(tmp_path)
    assert not leftover.exists()


def test_the_last_one_saved_is_the_newest_though_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newest, "_last_timestamp", "")

    def at(year: int) -> None:
        clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, zone: datetime(year, 1, 1, tzinfo=zone))})
        monkeypatch.setattr(newest, "datetime", clock)

    for year, step in ((2030, 9), (2020, 5), (2020, 6)):
        at(year)
        checkpoint = NEEDED | {"state_dict": {"model.x": torch.ones(1)}, "global_step": step, "optimizer_groups": []}
        PortableCheckpointIO().save_checkpoint(checkpoint, tmp_path / str(step % 2) / f"step-{step}.ckpt")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-6.ckpt", "step-5.ckpt", "step-9.ckpt"]
    monkeypatch.setattr(newest, "gather_problems", lambda path: [])
    with pytest.warns(UserWarning, match=r"step-9.ckpt is of step 9, but the run went back since"):
        assert choose_checkpoint(tmp_path) == tmp_path / "0/step-6.ckpt"
    monkeypatch.setattr(newest, "gather_problems", lambda path: ["damaged"] if Path(path).name != "step-5.ckpt" else [])
    os.rename(tmp_path / "1/step-9.ckpt", tmp_path / "step-9.lost")
    with pytest.warns(UserWarning, match="skipping") as seen:
        assert choose_checkpoint(tmp_path) == tmp_path / "1/step-5.ckpt"
    assert not any("went back" in str(one.message) for one in seen)  # the later one is damaged


def test_a_run_that_went_back_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it was killed before it saved anything; in another folder, which has none of its own yet, too."""
    monkeypatch.setattr(newest, "gather_problems", lambda path: [])

    def saved(step: int, start: int) -> None:
        checkpoint = NEEDED | {"state_dict": {"model.x": torch.ones(1)}, "global_step": step, "optimizer_groups": []}
        PortableCheckpointIO().save_checkpoint(checkpoint | {"start": start}, tmp_path / f"run/step-{step}.ckpt")

    saved(8, start=0)
    saved(20, start=0)
    starts: list[dict[str, Any]] = [{"checkpoint": None}]
    (tmp_path / "run/starts.json").write_text(json.dumps(starts))
    assert choose_checkpoint(tmp_path / "run").name == "step-20.ckpt"
    (tmp_path / "run/starts.json").write_text(json.dumps([*starts, {"checkpoint": "step-8.ckpt"}]))
    with pytest.warns(UserWarning, match=r"step-20.ckpt is of step 20, but the run went back since"):
        assert choose_checkpoint(tmp_path / "run").name == "step-8.ckpt"
    monkeypatch.setattr(portable, "next_timestamp", lambda folder: "2020")  # a clock that was set back
    saved(12, start=1)
    with pytest.warns(UserWarning, match=r"step-20.ckpt is of step 20"):
        assert choose_checkpoint(tmp_path / "run").name == "step-12.ckpt"
    (tmp_path / "branch").mkdir()
    (tmp_path / "branch/starts.json").write_text(json.dumps([{"checkpoint": str(tmp_path / "run/step-8.ckpt")}]))
    assert has_checkpoints(tmp_path / "branch") and choose_checkpoint(tmp_path / "branch").name == "step-8.ckpt"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (40, "was saved again since, at step 40, and the run went on from step 20 of it"),
        (20, "was saved again since, at step 20, and"),  # by a run that was begun anew
        (None, "at step 20, is gone; bring it"),
    ],
)
def test_a_branch_does_not_go_on_from_what_has_taken_the_place_of_its_checkpoint(
    step: int | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed before it saved one of its own; the run that it began from went on."""
    monkeypatch.setattr(newest, "gather_problems", lambda path: [])
    theirs, branch = tmp_path / "run/last.ckpt", tmp_path / "branch"
    branch.mkdir()

    def save(step: int) -> None:
        checkpoint = NEEDED | {"state_dict": {"model.x": torch.ones(1)}, "global_step": step, "optimizer_groups": []}
        PortableCheckpointIO().save_checkpoint(checkpoint, theirs)

    save(20)
    start = {"step": 20, "checkpoint": str(theirs)}
    for saved_at in ({}, {"saved_at": read_document(theirs)["saved_at"]}):  # an older nlgmoe records no time
        (branch / "starts.json").write_text(json.dumps([start | saved_at]))
        assert choose_checkpoint(branch) == theirs
    if step is None:
        shutil.rmtree(theirs)
    else:
        save(step)
    assert has_checkpoints(branch)  # it is not to begin again
    with pytest.warns(UserWarning, match="skipping"), pytest.raises(ValueError, match=message):
        choose_checkpoint(branch)


def test_what_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    """Another machine's, whose number may be no process here; a lock says that it trains in the folder."""
    writing = tmp_path / ".step-8.ckpt.writing-4194305"
    writing.mkdir()
    holds = (
        "import sys\nfrom filelock import FileLock\n"
        f"with FileLock({str(tmp_path / '.lock')!r}):\n    print(flush=True)\n    sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline()
    with pytest.raises(ValueError, match="no valid checkpoint"):
        choose_checkpoint(tmp_path)
    assert writing.exists()
    other.communicate()
    with pytest.raises(ValueError, match="no valid checkpoint"):
        choose_checkpoint(tmp_path)
    assert not writing.exists()


def test_a_folder_for_transformers_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a folder for transformers; make a checkpoint of it with nlgmoe import"):
        choose_checkpoint(tmp_path, to_train=False)


def test_a_summary_counts_the_other_problems() -> None:
    assert newest._summary(["a"]) == "a"
    assert newest._summary(["a", "b", "c"]) == "a (and 2 more problems: nlgmoe verify lists them)"
