"""Which run a folder is of, and what may be saved there: a run replaces and deletes checkpoints of its own only."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from nlgmoe.checkpoint.folder import holds_run, is_of_run, read_document, run_config
from nlgmoe.checkpoint.newest import LOCK_SECONDS, has_checkpoints, list_checkpoints
from nlgmoe.files import write_json

ANOTHER_RUN = (
    "{} holds a run already, and {} is not of it: choose another trainer.default_root_dir to go on "
    "from that checkpoint there"
)
_OWNER = ".run_folder"  # in a folder of checkpoints outside the run folder: which it is


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Return the folder of each `ModelCheckpoint`."""
    keepers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    return [Path(keeper.dirpath) for keeper in keepers if keeper.dirpath is not None]


def refuse_second_run(folder: Path, checkpoint: Any = None, places: Sequence[Path] = ()) -> None:
    """Refuse a second run in a folder; a run may be resumed.

    Args:
        folder: the run folder.
        checkpoint: to resume.
        places: where the run saves checkpoints.

    Raises:
        ValueError: `folder` holds a run, or one of `places` checkpoints, and there is none to resume, or it is of another run.
    """
    for place in places:
        if is_of_run(place, folder) or not has_checkpoints(place):
            continue
        owner = _owner(place, folder)
        own = holds_run(folder) if owner is None else _same(owner, folder)
        if not own or checkpoint is None:
            raise ValueError(
                f"ModelCheckpoint.dirpath={place} holds checkpoints of another run, which this one would replace: set it to a "
                "folder of its own, or leave it out; to go on with the other run, give its trainer.default_root_dir and the path "
                "of a checkpoint"
            )
    if checkpoint is not None and any(is_of_run(checkpoint, place) for place in (folder, *places)):
        return
    run = _run_of(folder)
    backed_up = checkpoint is not None and run is not None and _saved_by(checkpoint) == run
    if backed_up and run_config(Path(os.path.realpath(checkpoint))) is None:
        return  # its own, in no run folder; in one, that is a copy of this folder, or the original
    if not holds_run(folder) and (checkpoint is not None or not list_checkpoints(folder)):
        return  # one that goes on from another run's end holds a checkpoint and no configuration
    if checkpoint is None:
        if not has_checkpoints(folder):
            raise ValueError(
                f"{folder} holds a run that left no checkpoint: choose another trainer.default_root_dir, or, if it was killed "
                "before it saved one, start it again with --ckpt_path auto"
            )
        raise ValueError(
            f"{folder} holds a run already: continue it with --ckpt_path last (in Python, its folder as ckpt_path), or choose "
            "another trainer.default_root_dir"
        )
    raise ValueError(ANOTHER_RUN.format(folder, checkpoint))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock `folder` against a second process that trains in it and would replace checkpoints; a process may lock it twice.

    The operating system releases the lock when the process ends.

    Raises:
        ValueError: another process has the folder, and keeps it for ten seconds.
    """
    lock = FileLock(Path(os.path.realpath(folder), ".lock"), timeout=LOCK_SECONDS, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another process trains in trainer.default_root_dir={folder}: wait for its end, or choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def require_writable(folder: Path, places: Sequence[Path] = (), setting: str = "trainer.default_root_dir") -> None:
    """Check that the run folder can be written, before a corpus is tokenised.

    Args:
        folder: the run folder.
        places: where the run saves checkpoints.
        setting: that names the folder.

    Raises:
        ValueError: one of them cannot be written.
    """
    for place in places:
        if place.exists() or not is_of_run(place, folder):  # a new run leaves the folder empty until it saves
            require_writable(place, setting="ModelCheckpoint.dirpath")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{setting}={folder} cannot be written ({error.strerror}); choose another folder") from error


def claim(folder: Path, places: Sequence[Path], run: str | None) -> None:
    """Note in folders of checkpoints outside the run folder, as where `checkpoints` is a link, which run folder they are of.

    Args:
        folder: the run folder.
        places: where the run saves checkpoints.
        run: its id.

    Raises:
        ValueError: they are of another run folder, of which this one may be a copy.
    """
    for place in places:
        real = Path(os.path.realpath(place))
        if real.is_relative_to(os.path.realpath(folder)):
            continue
        owner = _owner(place, folder)
        copied = owner is not None and run is not None and _run_of(owner) == run
        if owner is not None and not _same(owner, folder) and (copied or (real / _OWNER).is_file()):
            raise ValueError(
                f"{place} has the checkpoints of {owner}, which {folder} would replace: give this one its own, as a copy in "
                f"place of a link, or another ModelCheckpoint.dirpath; if {owner} is not to go on, remove it"
            )
        if real.is_dir():
            write_json(real / _OWNER, {"folder": os.path.realpath(folder), "run": run})


def _owner(place: Path, folder: Path) -> Path | None:
    """Return the run folder whose checkpoints a folder has; None if that is not known, or the run is there no more.

    Args:
        place: the folder.
        folder: a run folder that it may be of, also before that has a record of starts.
    """
    real = Path(os.path.realpath(place))
    try:
        noted = json.loads((real / _OWNER).read_text())
        found, run = Path(noted["folder"]), noted["run"]
    except (OSError, ValueError, TypeError, KeyError):
        above = (real, *real.parents)
        return next((one for one in above if (one / "starts.json").is_file()), None)
    return found if _same(found, folder) or (run is not None and _run_of(found) == run) else None


def _same(one: Path, other: Path) -> bool:
    """Return whether two paths lead to one folder, also by a mount."""
    try:
        return one.samefile(other)
    except OSError:  # there is none, or not yet
        return False


def _saved_by(checkpoint: Any) -> Any:
    """Return the id of the run that has saved a checkpoint; None if it is not known."""
    try:
        return read_document(checkpoint).get("run")
    except (ValueError, OSError):
        return None


def _run_of(folder: Path) -> str | None:
    """Return the id of the run that a folder has a record of."""
    try:
        run = json.loads((folder / "starts.json").read_text())[0]["run"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return run if isinstance(run, str) else None
