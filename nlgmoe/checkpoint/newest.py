"""Which checkpoint a run goes on from: the one that is named, or the newest valid one of a run folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed

from nlgmoe.checkpoint.agreement import AgreedError
from nlgmoe.checkpoint.folder import everything_under, read_document
from nlgmoe.checkpoint.verify import agreed_problems
from nlgmoe.checkpoint.writing import recover
from nlgmoe.files import require_regular

_saved_last = ""  # time stamp, of this process, in whatever folder


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint, valid or not, and what its `checkpoint.json` says.

    Attributes:
        path: of the folder.
        saved_at: when it was written, in ISO format; of a damaged one, what the file system says.
        step: of the run; -1 of a damaged one.
        trains: whether training can go on from it: it holds more than weights.
        start: of the run, that saved it: its place in `starts.json`; None where that is not known.
    """

    path: Path
    saved_at: str
    step: int
    trains: bool
    start: int | None = None


def choose(path: str | Path, to_train: bool = True) -> Path:
    """The checkpoint `path`; of a run folder, its newest valid checkpoint. Every rank has to call this.

    Ranks check a checkpoint together before any of them uses it, so that all have the same error. One process that is given
    a checkpoint reads it once, checking as it goes.

    Args:
        path: a checkpoint, or a folder with checkpoints somewhere in it.
        to_train: whether training goes on; a checkpoint that holds weights only is then of no use.

    Raises:
        AgreedError: there is no valid checkpoint.
    """
    if is_checkpoint(path):
        if distributed.is_initialized() and (found := agreed_problems(path)):
            raise AgreedError(f"{_summary(found)}; use another checkpoint")
        return Path(path)
    skipped = []
    all_of_them = _agreed_candidates(Path(path), to_train)
    for candidate in all_of_them:
        found = agreed_problems(candidate.path)
        if not found and to_train and not candidate.trains:
            found = [f"{candidate.path} holds weights only"]
        if not found:
            rank_zero_info(f"newest checkpoint: {candidate.path}, step {candidate.step}")
            last = max(all_of_them, key=lambda one: one.step)
            if last.step > candidate.step:
                rank_zero_warn(
                    f"{last.path} is of step {last.step}, but the run went back since; name it to take that one"
                )
            return candidate.path
        rank_zero_warn(f"skipping a checkpoint that cannot be used: {_summary(found)}")
        skipped.append(candidate.path.name)
    more = f" (skipped {', '.join(skipped)})" if skipped else ""
    raise AgreedError(f"no valid checkpoint in {path}{more}; start the run anew in another folder")


def find(place: str | Path) -> Path:
    """The checkpoint `place`, or the newest valid one of a run's folder, to take weights from.

    One that is named is checked as it is read. Where there are ranks, every rank has to call this.

    Raises:
        ValueError: there is no valid checkpoint in the folder.
    """
    return Path(place) if is_checkpoint(place) else choose(place, to_train=False)


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` names one checkpoint, not a folder of them."""
    path = Path(path)
    return path.suffix == ".ckpt" or (path / "checkpoint.json").exists() or not path.is_dir()


def has_checkpoints(folder: Path) -> bool:
    """Whether there is any to go on from, valid or not; one that a killed process was replacing counts."""
    _, resumed = _last_start(folder)
    return (resumed is not None and resumed.exists()) or any(
        path.suffix == ".ckpt" or ".ckpt.replaced-" in path.name for path in everything_under(folder)
    )


def candidates(folder: Path) -> list[Path]:
    """All checkpoints under a folder, valid or not, latest first; of links to the same one, one."""
    return [candidate.path for candidate in _candidates(folder)]


def time_of_save(folder: Path) -> str:
    """Time stamp of a checkpoint that is saved now, in ISO format: checkpoints of a folder are ordered by it.

    Where the clock was set back, it is the moment after the newest one's, and after the last one that this process saved.
    """
    global _saved_last
    now, found = datetime.now(UTC), _candidates(folder)
    latest = max(_saved_last, found[0].saved_at) if found else _saved_last
    if latest >= now.isoformat(timespec="microseconds"):
        now = datetime.fromisoformat(latest) + timedelta(microseconds=1)
    _saved_last = now.isoformat(timespec="microseconds")
    return _saved_last


def _candidates(folder: Path) -> list[_Candidate]:
    found: dict[str, Path] = {}
    for path in sorted(everything_under(folder)):
        if path.suffix == ".ckpt" and not path.name.startswith("."):
            found.setdefault(os.path.realpath(path), path)
    return sorted(map(_read, found.values()), key=lambda one: one.saved_at, reverse=True)


def _read(path: Path) -> _Candidate:
    try:
        document = read_document(path)
        saved_at, step, trains = str(document["saved_at"]), int(document["global_step"]), "optimizer_groups" in document
        return _Candidate(path, saved_at, step, trains, document.get("start"))
    except (ValueError, KeyError, TypeError, OSError):
        written = datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        return _Candidate(path, written.isoformat(timespec="microseconds"), -1, False)


def _agreed_candidates(folder: Path, to_train: bool) -> list[_Candidate]:
    """Of rank 0, which first, if training goes on, cleans up after a killed process; a run that is alive may be evaluated."""
    found: list[list[_Candidate]] = [[]]
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        if to_train:
            recover(folder)
        found = [_of_last_start_first(folder, _candidates(folder))]
    if distributed.is_initialized():
        distributed.broadcast_object_list(found)
    return found[0]


def _of_last_start_first(folder: Path, found: list[_Candidate]) -> list[_Candidate]:
    """Before all others what the run's last start has saved, then what it went on from.

    A run that went back to an earlier checkpoint, and was killed before it saved another, stays on that branch.
    """
    number, resumed = _last_start(folder)
    first = [one for one in found if one.start == number]
    if resumed is not None and resumed.exists():
        if not first and found and os.path.realpath(resumed) != os.path.realpath(found[0].path):
            rank_zero_info(f"the last start of the run went on from {resumed} and saved nothing")
        first.append(_read(resumed))
    return first + [one for one in found if one not in first]


def _last_start(folder: Path) -> tuple[int, Path | None]:
    """Number of the last start that `starts.json` lists, and the checkpoint it went on from, if any; -1 if there is none."""
    try:
        require_regular(folder / "starts.json", "remove it")
        starts = json.loads((folder / "starts.json").read_text())
        resumed = starts[-1].get("checkpoint")
        return len(starts) - 1, folder / resumed if resumed is not None else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return -1, None


def _summary(found: list[str]) -> str:
    return found[0] + (f" (and {len(found) - 1} more problems: nlgmoe verify lists them)" if len(found) > 1 else "")
