"""Choose the checkpoint that a run resumes from: the one given, or the newest valid one of a run folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed

from nlgmoe.checkpoint.agreement import AllRanksError
from nlgmoe.checkpoint.folder import read_document, walk_folder
from nlgmoe.checkpoint.verify import gather_problems
from nlgmoe.checkpoint.writing import recover
from nlgmoe.files import require_regular
from nlgmoe.validation import SettingError, require

LOCK_SECONDS = 10.0  # for a process that ends in a run folder
RESUMING = ".resuming.json"  # in a run folder: what a start resumes, until it is recorded in `starts.json`
_last_timestamp = ""  # of the last checkpoint that this process saved, in any folder


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint, valid or not.

    Attributes:
        path: the folder.
        saved_at: time of the save, in ISO format; of a damaged checkpoint, the folder's modification time.
        step: optimizer steps; -1 of a damaged checkpoint.
        resumable: false if it is damaged or holds weights only.
        start: index in `starts.json` of the start that saved it; None if unknown.
        problem: why the run cannot go on from it, although it may be valid.
    """

    path: Path
    saved_at: str
    step: int
    resumable: bool
    start: int | None = None
    problem: str | None = None


def choose_checkpoint(path: str | Path, to_train: bool = True) -> Path:
    """Return the checkpoint `path`, or the newest valid checkpoint of a run folder. A collective.

    All ranks verify a checkpoint together before one of them uses it, so that all raise the same error. A single process
    verifies a checkpoint that was given while it reads it.

    Args:
        path: a checkpoint, or a folder that contains checkpoints at any depth.
        to_train: skip checkpoints that hold weights only, from which training cannot resume.

    Raises:
        AllRanksError: there is no valid checkpoint.
        SettingError: there is none at all.
    """
    if is_checkpoint(path):
        if distributed.is_initialized() and (found := gather_problems(path)):
            raise AllRanksError(f"{_summary(found)}; use another checkpoint")
        return Path(path)
    skipped = []
    candidates = _broadcast_candidates(Path(path), to_train)
    for index, candidate in enumerate(candidates):
        found = [candidate.problem] if candidate.problem is not None else gather_problems(candidate.path)
        if not found and to_train and not candidate.resumable:
            found = [f"{candidate.path} holds weights only"]
        if not found:
            rank_zero_info(f"newest checkpoint: {candidate.path}, step {candidate.step}")
            last = max(candidates[index:], key=lambda one: one.step)  # those before cannot be used
            if last.step > candidate.step:
                rank_zero_warn(
                    f"{last.path} is of step {last.step}, but the run went back since; give its path to use it"
                )
            return candidate.path
        rank_zero_warn(f"skipping a checkpoint that cannot be used: {_summary(found)}")
        skipped.append(f"{candidate.path.name}: {_summary(found)}")
    remedy = "start a new run in another folder" if to_train else "name a checkpoint, or the folder of a run"
    if (Path(path) / "config.json").exists() and not skipped:  # as `nlgmoe export` writes
        remedy = "it is a folder for transformers; make a checkpoint of it with nlgmoe import"
    why = f" ({skipped[0]}{f'; and {len(skipped) - 1} more' if len(skipped) > 1 else ''})" if skipped else ""
    raise (AllRanksError if skipped else SettingError)(f"no valid checkpoint in {path}{why}; {remedy}")


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint `path`, unverified, or the newest valid one of a run folder, to read weights from. A collective.

    Raises:
        AllRanksError: there is no valid checkpoint in the folder.
    """
    return Path(path) if is_checkpoint(path) else choose_checkpoint(path, to_train=False)


def is_checkpoint(path: str | Path) -> bool:
    """Return True if `path` names one checkpoint, False if it is a folder of them.

    Raises:
        SettingError: it is empty, as an unset variable of a shell is; it would be the working directory.
    """
    require(str(path) != "", "the name of a checkpoint or run folder is empty; give one")
    path = Path(path)
    return path.suffix == ".ckpt" or (path / "checkpoint.json").exists() or not path.is_dir()


def has_checkpoints(folder: Path) -> bool:
    """Return True if a folder has a checkpoint to resume from, valid or not, or one that a killed process was replacing.

    So has one whose last start has resumed a checkpoint elsewhere, also if that is gone: it is not to begin again.
    """
    return _last_start(folder).resumed is not None or any(
        path.suffix == ".ckpt" or ".ckpt.replaced-" in path.name for path in walk_folder(folder)
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints of a folder, valid or not, newest first, each once even if links lead to it."""
    return [candidate.path for candidate in _candidates(folder)]


def next_timestamp(folder: Path) -> str:
    """Return the time in ISO format, even if the clock was set back later than any checkpoint in `folder` or of this process."""
    global _last_timestamp
    now, found = datetime.now(UTC), _candidates(folder)
    latest = max(_last_timestamp, found[0].saved_at) if found else _last_timestamp
    if latest >= now.isoformat(timespec="microseconds"):
        now = datetime.fromisoformat(latest) + timedelta(microseconds=1)
    _last_timestamp = now.isoformat(timespec="microseconds")
    return _last_timestamp


def _candidates(folder: Path) -> list[_Candidate]:
    found: dict[str, Path] = {}
    for path in sorted(walk_folder(folder)):
        if path.suffix == ".ckpt" and not path.name.startswith("."):
            found.setdefault(os.path.realpath(path), path)
    there = [one for one in map(_read, found.values()) if one is not None]
    return sorted(there, key=lambda one: one.saved_at, reverse=True)


def _read(path: Path) -> _Candidate | None:
    """Return the checkpoint `path`; None if it was deleted since it was listed."""
    try:
        document = read_document(path)
        saved_at, step, resumable = (
            str(document["saved_at"]),
            int(document["global_step"]),
            "optimizer_groups" in document,
        )
        return _Candidate(path, saved_at, step, resumable, document.get("start"))
    except (ValueError, KeyError, TypeError, OSError):
        if not os.path.lexists(path):
            return None
        modified = datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        return _Candidate(path, modified.isoformat(timespec="microseconds"), -1, False)


def _broadcast_candidates(folder: Path, to_train: bool) -> list[_Candidate]:
    """Return rank 0's candidates; before training, clean up first. An evaluated run may still be training: leave its files."""
    found: list[list[_Candidate]] = [[]]
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        if to_train:
            _recover_alone(folder)
        found = [_sort_last_start_first(folder, _candidates(folder))]
    if distributed.is_initialized():
        distributed.broadcast_object_list(found)
    return found[0]


def _sort_last_start_first(folder: Path, found: list[_Candidate]) -> list[_Candidate]:
    """Move the checkpoints of the run's last start to the front, followed by the one it resumed from.

    So a run that went back to an earlier checkpoint stays on that branch, even if it was killed before it saved another.
    """
    last = _last_start(folder)
    first = [candidate for candidate in found if candidate.start == last.number]
    if last.resumed is not None and not is_checkpoint(last.resumed):  # killed before one of that run folder was chosen
        return _sort_last_start_first(last.resumed, _candidates(last.resumed))
    if last.resumed is not None and all(os.path.realpath(last.resumed) != os.path.realpath(one.path) for one in first):
        resumed = _resumed_by(last)
        if not first and found and os.path.realpath(last.resumed) != os.path.realpath(found[0].path):
            rank_zero_info(f"the last start of the run went on from {last.resumed} and saved nothing")
        found = [one for one in found if os.path.realpath(one.path) != os.path.realpath(last.resumed)]
        first.append(resumed)
    return first + [one for one in found if one not in first]


@dataclass(frozen=True)
class _Start:
    """The last start: its index in `starts.json` (-1: none), the checkpoint (or run folder) that it resumed, step and time."""

    number: int = -1
    resumed: Path | None = None
    step: int | None = None
    saved_at: str | None = None


def _last_start(folder: Path) -> _Start:
    found = _read_start(folder / RESUMING, folder)  # killed before it was recorded
    return found if found.resumed is not None else _read_start(folder / "starts.json", folder)


def _read_start(file: Path, folder: Path) -> _Start:
    try:
        require_regular(file, "remove it")
        starts = json.loads(file.read_text())
        number, last = (len(starts) - 1, starts[-1]) if isinstance(starts, list) else (-1, starts)
        resumed = last.get("checkpoint")
        return _Start(number, None if resumed is None else folder / resumed, last.get("step"), last.get("saved_at"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return _Start()


def _resumed_by(last: _Start) -> _Candidate:
    """Return the checkpoint that the last start resumed; it may have been deleted or replaced since, as by another run."""
    assert last.resumed is not None
    found = _read(last.resumed) if last.resumed.exists() else None
    if found is None:
        at = "" if last.step is None else f" at step {last.step}"
        problem = f"{last.resumed}, from which the run went on{at}, is gone; bring it back, or give another path"
        return _Candidate(last.resumed, "", -1, False, problem=problem)
    # The run saves its own again at the same step; of those, and by an older nlgmoe, no time is recorded.
    another = last.step != found.step if last.saved_at is None else last.saved_at != found.saved_at
    if last.step is not None and found.step != -1 and another:
        problem = (
            f"{last.resumed} was saved again since, at step {found.step}, and the run went on from step {last.step} of it; give "
            "the path of a checkpoint to go on from"
        )
        return replace(found, problem=problem)
    return found


def _recover_alone(folder: Path) -> None:
    """Clean up after killed processes, unless another one, on whatever machine, trains in the folder."""
    path = Path(os.path.realpath(folder), ".lock")
    if not path.exists():
        return recover(folder)
    lock = FileLock(path, timeout=LOCK_SECONDS, is_singleton=True)  # as `held` makes it, which this process may have
    try:
        lock.acquire(timeout=0)
    except OSError:  # it is taken, or the folder is another user's
        return None
    try:
        return recover(folder)
    finally:
        lock.release()


def _summary(found: list[str]) -> str:
    return found[0] + (f" (and {len(found) - 1} more problems: nlgmoe verify lists them)" if len(found) > 1 else "")
