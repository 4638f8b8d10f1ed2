"""The run folder, `trainer.default_root_dir`: one run, its resolved configuration, and its checkpoints."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from nlgmoe.checkpoint.folder import is_of_run
from nlgmoe.checkpoint.newest import RESUMING
from nlgmoe.cli.monitors import check_monitors
from nlgmoe.cli.ownership import ANOTHER_RUN, checkpoint_folders, claim, held, refuse_second_run, require_writable
from nlgmoe.files import atomic_write, require_regular, write_json
from nlgmoe.module import MoEGPTModule
from nlgmoe.monitoring.loggers import RunCSVLogger
from nlgmoe.resuming.reserved import require_free
from nlgmoe.versions import versions


class RunFolder(SaveConfigCallback):
    """Saves the resolved configuration and the versions into the run folder, `trainer.default_root_dir`."""

    _holding: ExitStack | None = None  # the folder, in `fit`
    _resumed: str | None = None  # the checkpoint that this start resumes
    # When that was saved, if it is outside the folder: the run saves its own again.
    _resumed_saved_at: str | None = None
    _start: int | None = None  # index of this start in `starts.json`; until it is recorded, that of the resumed one
    _identified = _recorded = False  # this start
    _run: str | None = None  # identifies the run, wherever it is moved; none in what an older nlgmoe has written
    _rows = 0  # that `metrics.csv` had before this start
    _noted: bytes | None = None  # what the folder's note said before this start
    _notes: Path | None = None  # that note, once this start has written it

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the path of the checkpoint, also where a run folder was given."""
        folder = Path(trainer.default_root_dir)
        self._resumed, self._start, self._run = checkpoint["path"], checkpoint.get("start"), checkpoint.get("run")
        self._resumed_saved_at = None if is_of_run(checkpoint["path"], folder) else checkpoint["saved_at"]
        if trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero:
            self.note(folder, checkpoint["path"], checkpoint["global_step"], self._resumed_saved_at)

    def note(self, folder: Path, checkpoint: Any, step: int | None = None, saved_at: str | None = None) -> None:
        """Note in the run folder what this start resumes: it may be killed before it is recorded, by the first step.

        Args:
            folder: the run folder.
            checkpoint: its path, or that of the run folder in which it is still to be chosen.
            step: of it; None: not read yet.
            saved_at: when it was saved; None: not read yet, or of this run.
        """
        if self._notes is None:
            self._notes = folder / RESUMING
            self._noted = self._notes.read_bytes() if self._notes.is_file() else None
        write_json(self._notes, {"checkpoint": _within(folder, checkpoint), "step": step, "saved_at": saved_at})

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the run, and its start, that saved the checkpoint: also one that has validated, and taken no step yet."""
        require_free(checkpoint, {"run", "start"})
        if trainer.state.fn == TrainerFn.FITTING and self._identified and not self.already_saved:
            self._record(trainer, trained=False, saves=True)
        checkpoint |= {"start": self._start, "run": self._run}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hold the folder in `fit`, also from Python; leave `metrics.csv` alone in an evaluation; check what is written to.

        `on_train_batch_start` records the configuration, once nothing has refused the run.

        Raises:
            ValueError: another process trains in the folder, or it cannot be written.
        """
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.records = stage == "fit"
        folder = Path(trainer.default_root_dir)
        if stage in ("fit", "predict"):
            require_writable(folder, checkpoint_folders(trainer) if stage == "fit" else ())
        if stage == "fit":  # not what an evaluation has loaded; a checkpoint to resume is loaded after this
            self._resumed = self._resumed_saved_at = self._start = self._run = None
            self._identified = self._recorded = False
        if stage == "fit" and trainer.is_global_zero:
            self._holding = ExitStack()
            self._holding.enter_context(held(folder))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record a start that took no step, as at the end of a run, if settings, versions or branch are not the last start's."""
        if not self.already_saved:
            self.already_saved = True
            self._record(trainer, trained=False)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the folder; a run that was at its end may have recorded no start."""
        if self._notes is not None:
            self._notes.unlink(missing_ok=True)
            self._notes = None
        self._release()

    def _release(self) -> None:
        if self._holding is not None:
            self._holding.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the folder; if the start is refused, as it was."""
        if self._notes is not None and isinstance(exception, ValueError):
            self._notes.unlink(missing_ok=True)
            if self._noted is not None:
                self._notes.write_bytes(self._noted)
            self._notes = None
        self._release()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the run before it saves anything.

        Raises:
            ValueError: the folder holds another run, or a callback monitors what is never logged.
        """
        assert isinstance(pl_module, MoEGPTModule)
        self.already_saved = False  # each fit of a notebook is a start
        check_monitors(trainer, pl_module)
        folder, places = Path(trainer.default_root_dir), checkpoint_folders(trainer)
        if trainer.is_global_zero and self.config.get("ckpt_path") != "auto":
            refuse_second_run(folder, trainer.ckpt_path, places)
        if trainer.is_global_zero:
            self._identify(folder, places)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                claim(folder, places, self._run)
            metrics = folder / "metrics.csv"  # before the validation that a resumed run may have left
            self._rows = max(0, metrics.read_bytes().count(b"\n") - 1) if metrics.is_file() else 0

    def _identify(self, folder: Path, places: Sequence[Path]) -> None:
        """Set the run's id: that of the folder, of a checkpoint in it, or a new one; before anything is saved.

        Raises:
            ValueError: the folder holds another run than the checkpoint's, or its record of starts is damaged.
        """
        starts, theirs = _read_starts(folder), self._run
        if starts:
            self._run = starts[0].get("run")
            resumed_before = {os.path.abspath(folder / one["checkpoint"]) for one in starts if one.get("checkpoint")}
            of_it = self._run == theirs or os.path.abspath(self._resumed or "") in resumed_before
            if not of_it and None not in (self._run, theirs):
                raise ValueError(ANOTHER_RUN.format(folder, self._resumed))
        elif self._resumed is None or not any(is_of_run(self._resumed, one) for one in (folder, *places)):
            self._run = uuid4().hex  # a new run, or one that goes on from another
        if self._run != theirs:
            self._start = None  # of another run
        self._identified = True

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the configuration once, before the first step: by then nothing, such as a teacher, has refused the run.

        Lightning calls no hook between `on_train_start` and this one when a run is resumed.
        """
        if not self.already_saved:
            self.already_saved = True
            self.save_config(trainer, pl_module, "fit")

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml` and `versions.json`, and record the start."""
        self._record(trainer, trained=True)

    @rank_zero_only
    def _record(self, trainer: Trainer, trained: bool, saves: bool = False) -> None:
        """Record the start, and that it trains in `config.yaml` and `versions.json`.

        The configuration repeats the run from its beginning: without the checkpoint it may have been resumed from.
        `starts.json` lists the starts in the order of time, each with the step from which its settings held, the checkpoint
        that it resumed, the start that had saved that, and the rows that `metrics.csv` had.

        Args:
            trainer: of the fit.
            trained: it takes a step. If not, it is recorded only if it saves, or where the last start was of another branch, or
                had other settings or versions.
            saves: it saves a checkpoint before its first step.
        """
        folder = Path(trainer.default_root_dir)
        config, starts = copy.deepcopy(self.config), _recorded_starts(folder)
        if self._recorded and starts:  # as it saved a checkpoint
            self._start = starts.pop().get("parent")
        config.pop("ckpt_path", None)  # null in a file would count where the file follows the option
        text = self.parser.dump(config, skip_none=False).encode()
        name = starts[-1]["config"] if starts else ""
        changed = not starts or not (folder / name).is_file() or (folder / name).read_bytes() != text
        if self._start is not None and self._start >= len(starts):
            self._start = None  # its record was removed
        last = _last_trained(starts, len(starts) - 1)
        base = last if self._start is None else _last_trained(starts, self._start)
        same = not changed and starts[-1]["versions"] == versions() and base == last
        if not trained and (not starts or (same and not saves and not self._recorded)):
            return
        (folder / "starts").mkdir(parents=True, exist_ok=True)
        if changed:
            name = f"starts/{len(starts)}-step-{trainer.global_step}.yaml"
            (folder / name).write_bytes(text)
        if trained:
            with atomic_write(folder / "config.yaml") as new:
                new.write_bytes(text)
        start = {
            "run": self._run,
            "step": trainer.global_step,
            "config": name,
            "versions": versions(),
            "checkpoint": None if self._resumed is None else _within(folder, self._resumed),
            "saved_at": self._resumed_saved_at,
            "parent": self._start,
            "trained": trained,
            "rows": self._rows,
        }
        write_json(folder / "starts.json", [*starts, start])
        (folder / RESUMING).unlink(missing_ok=True)
        self._notes = None
        if trained:
            write_json(folder / "versions.json", start["versions"])
        elif base != last and (folder / starts[base]["config"]).is_file():  # it returned to the branch of another start
            shutil.copy(folder / starts[base]["config"], folder / "config.yaml")
            write_json(folder / "versions.json", starts[base]["versions"])
        self._start, self._recorded = len(starts), True


def _within(folder: Path, path: Any) -> str:
    """Return a path relative to a run folder, which may be moved, if it is in it; else an absolute one."""
    for resolve in (os.path.abspath, os.path.realpath):
        inner, outer = Path(resolve(path)), Path(resolve(folder))
        if inner.is_relative_to(outer):
            return str(inner.relative_to(outer))
    return os.path.abspath(path)


def _read_starts(folder: Path) -> list[dict[str, Any]]:
    """Read `starts.json`; empty if there is none.

    Raises:
        ValueError: it is damaged.
    """
    file = folder / "starts.json"
    require_regular(file, "remove it")
    if not file.exists():
        return []
    try:
        starts = json.loads(file.read_text())
        if all(isinstance(one["config"], str) and isinstance(one.get("checkpoint"), str | None) for one in starts):
            return list(starts)
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{file} is damaged; remove it: the run goes on, without a record of its earlier starts")


def _recorded_starts(folder: Path) -> list[dict[str, Any]]:
    """Read the starts. A run of an older version has no record: its `config.yaml` and `versions.json` become the first one."""
    if starts := _read_starts(folder):
        return starts
    if not (folder / "config.yaml").exists() or not (folder / "versions.json").exists():
        return []
    name = "starts/0-step-0.yaml"
    (folder / "starts").mkdir(exist_ok=True)
    shutil.copy(folder / "config.yaml", folder / name)
    return [{"step": 0, "config": name, "versions": json.loads((folder / "versions.json").read_text())}]


def _last_trained(starts: list[dict[str, Any]], at: int) -> int:
    """Return the start whose steps led to start `at`: itself, or that of the checkpoint which it only validated."""
    while at > 0 and not starts[at].get("trained", True):
        parent = starts[at].get("parent")
        at = at - 1 if parent is None else parent
    return at
