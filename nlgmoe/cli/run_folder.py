"""The run folder, `trainer.default_root_dir`: one run, its resolved configuration, and its checkpoints."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from nlgmoe.checkpoint.folder import holds_run, is_of_run, read_document
from nlgmoe.checkpoint.newest import LOCK_SECONDS, RESUMING, has_checkpoints, is_checkpoint, list_checkpoints
from nlgmoe.cli.first_save import step_past_first_save
from nlgmoe.cli.monitors import check_monitors
from nlgmoe.files import atomic_write, require_regular, write_json
from nlgmoe.module import MoEGPTModule
from nlgmoe.monitoring.loggers import RunCSVLogger
from nlgmoe.validation import SettingError
from nlgmoe.versions import versions

_ANOTHER_RUN = (
    "{} holds a run already, and {} is not of it: choose another trainer.default_root_dir to go on "
    "from that checkpoint there"
)

_OWNER = ".run_folder"  # in a folder of checkpoints outside the run folder: which it is


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
        """Check the run before anything is written.

        Raises:
            ValueError: the folder holds another run, or a callback monitors what is never logged.
        """
        assert isinstance(pl_module, MoEGPTModule)
        self.already_saved = False  # each fit of a notebook is a start
        check_monitors(trainer, pl_module)
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero and self.config.get("ckpt_path") != "auto":
            refuse_second_run(folder, trainer.ckpt_path, checkpoint_folders(trainer))
        if trainer.is_global_zero:
            self._identify(folder, checkpoint_folders(trainer))
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                _claim(folder, checkpoint_folders(trainer), self._run)
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
                raise ValueError(_ANOTHER_RUN.format(folder, self._resumed))
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


def _claim(folder: Path, places: Sequence[Path], run: str | None) -> None:
    """Note in folders of checkpoints outside the run folder, as where `checkpoints` is a link, which run folder they are of.

    Args:
        folder: the run folder.
        places: where the run saves checkpoints.
        run: its id.

    Raises:
        ValueError: they are of a run folder of which this one is a copy.
    """
    for place in places:
        real = Path(os.path.realpath(place))
        owner = _owner(place, folder)
        if owner is not None and run is not None and _run_of(owner) == run and not _same(owner, folder):
            raise ValueError(
                f"{place} has the checkpoints of {owner}, of which {folder} is a copy: give this one its own, as a copy in place "
                f"of the link, or another ModelCheckpoint.dirpath; if {owner} is not to go on, remove it"
            )
        if real.is_dir() and not real.is_relative_to(os.path.realpath(folder)):
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


def _run_of(folder: Path) -> str | None:
    """Return the id of the run that a folder has a record of."""
    try:
        run = json.loads((folder / "starts.json").read_text())[0]["run"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return run if isinstance(run, str) else None


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
    raise ValueError(_ANOTHER_RUN.format(folder, checkpoint))


def require_checkpoint(path: str | Path) -> None:
    """Check that there is a checkpoint at `ckpt_path`; reading it verifies it.

    Raises:
        ValueError: there is none.
    """
    if is_checkpoint(path):
        read_document(path)
    elif not has_checkpoints(Path(path)):
        raise SettingError(f"no checkpoint at {path}: expected one, or a run's folder with some in it")


def resolve_checkpoint(
    name: Any,
    folder: Path,
    remedy: str,
    may_start: bool,
    places: Sequence[Path] = (),
    keepers: Sequence[ModelCheckpoint] = (),
) -> Any:
    """Replace `last` and `auto` by the run folder, or `auto` by None where a run may start and there is no checkpoint.

    All ranks choose the checkpoint together later (`checkpoint/newest.py`).

    Args:
        name: `ckpt_path` as it was given.
        folder: the run folder.
        remedy: what to do if there is none.
        may_start: whether a new run is the alternative.
        places: where the run saves checkpoints.
        keepers: the run's; one that was killed before its first checkpoint was due is started again.

    Raises:
        ValueError: there is no checkpoint, or the run does not save them in its folder; or `auto` would start a run again
            that has ended or must have saved a checkpoint.
    """
    if name not in ("last", "auto"):
        return name
    for place in places:
        if not is_of_run(place, folder):
            raise ValueError(
                f"ckpt_path={name} looks into trainer.default_root_dir={folder}, but ModelCheckpoint.dirpath={place} is outside: "
                "leave dirpath out (the folder checkpoints may be a link), or give the path of a checkpoint"
            )
    found = has_checkpoints(folder)
    if not found and not (name == "auto" and may_start):
        raise SettingError(f"ckpt_path={name}: there is no checkpoint in {folder}; {remedy}")
    if found:
        return str(folder)
    if (step := step_past_first_save(folder, keepers)) is not None:
        raise ValueError(
            f"ckpt_path={name}: {folder} has logged {step} steps but holds no checkpoint, and the run would start again at "
            "step 0; bring its checkpoints back, or choose another trainer.default_root_dir (a run that was killed before its "
            "first save starts again with the interval of saves that it had)"
        )
    return None


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
