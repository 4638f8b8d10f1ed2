"""The run folder, `trainer.default_root_dir`: one run, its resolved configuration, and the checkpoints it goes on from."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from nlgmoe.checkpoint.folder import read_document
from nlgmoe.checkpoint.newest import has_checkpoints, is_checkpoint
from nlgmoe.cli.monitors import check_monitors
from nlgmoe.module import MoEGPTModule
from nlgmoe.versions import versions


class RunFolder(SaveConfigCallback):
    """Saves the resolved configuration and the versions into the run folder, `trainer.default_root_dir`."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for `on_train_epoch_start`: only then has nothing refused the run, and is it known whether it is resumed."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before anything is written.

        Raises:
            ValueError: the folder holds another run, or a callback monitors what is never logged.
        """
        assert isinstance(pl_module, MoEGPTModule)
        check_monitors(trainer, pl_module)
        if trainer.is_global_zero and self.config.get("ckpt_path") != "auto":
            refuse_second_run(Path(trainer.default_root_dir), trainer.ckpt_path)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `config.yaml` and `versions.json`: whoever could refuse the run, such as a teacher, has not."""
        self.save_config(trainer, pl_module, "fit")

    @override
    @rank_zero_only
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The configuration repeats the run from its beginning: without the checkpoint it may have been resumed from."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.config)
        if "ckpt_path" in config:
            config["ckpt_path"] = None
        self.parser.save(config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)
        (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")


def refuse_second_run(folder: Path, checkpoint: Any = None) -> None:
    """A folder holds one run, which may be resumed.

    Raises:
        ValueError: `folder` holds a run and there is no checkpoint to resume, or it is of another run.
    """
    if not (folder / "config.yaml").exists():
        return
    if checkpoint is None:
        if not has_checkpoints(folder):
            raise ValueError(
                f"{folder} holds a run that left no checkpoint: start it again with --ckpt_path auto, or choose another "
                "trainer.default_root_dir"
            )
        raise ValueError(
            f"{folder} holds a run already: continue it with --ckpt_path last, or choose another trainer.default_root_dir"
        )
    if not any(Path(f(checkpoint)).is_relative_to(f(folder)) for f in (os.path.abspath, os.path.realpath)):
        raise ValueError(
            f"{folder} holds a run already, and {checkpoint} is not of it: choose another trainer.default_root_dir to go on "
            "from that checkpoint there"
        )


def require_checkpoint(path: Path) -> None:
    """Whether there is anything to load at `ckpt_path`; whether it is sound is found out when it is read.

    Raises:
        ValueError: there is not.
    """
    if is_checkpoint(path):
        read_document(path)
    elif not has_checkpoints(path):
        raise ValueError(f"no checkpoint at {path}: expected one, or a run's folder with some in it")


def resolve_checkpoint(name: Any, folder: Path, remedy: str, may_start: bool, elsewhere: Sequence[str] = ()) -> Any:
    """`last` and `auto` mean the run folder: its newest valid checkpoint; `auto` is content with none where a run may start.

    Which one that is, all ranks decide together once they know each other (`checkpoint/newest.py`).

    Args:
        name: `ckpt_path` as it was given.
        folder: the run folder.
        remedy: what to do if there is none.
        may_start: whether a new run is the alternative.
        elsewhere: where else the run saves checkpoints.

    Raises:
        ValueError: there is no checkpoint, or the run does not save them in its folder.
    """
    if name not in ("last", "auto"):
        return name
    for place in elsewhere:
        if not any(Path(f(place)).is_relative_to(f(folder)) for f in (os.path.abspath, os.path.realpath)):
            raise ValueError(
                f"ckpt_path={name} looks into trainer.default_root_dir={folder}, but ModelCheckpoint.dirpath={place} is outside: "
                "leave dirpath out (the folder checkpoints may be a link), or give the path of a checkpoint"
            )
    found = has_checkpoints(folder)
    if not found and not (name == "auto" and may_start):
        raise ValueError(f"ckpt_path={name}: there is no checkpoint in {folder}; {remedy}")
    return str(folder) if found else None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Be the only process that trains in `folder`: a second one would replace the first one's checkpoints.

    The operating system lets go when the process ends, however it does.

    Raises:
        ValueError: another process has the folder, and keeps it for ten seconds.
    """
    lock = FileLock(folder / ".lock", timeout=10)
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


def require_writable(folder: Path) -> None:
    """Find out now, not after tokenising a corpus.

    Raises:
        ValueError: the run folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"trainer.default_root_dir={folder} cannot be written ({error.strerror}); choose another folder"
        ) from error
