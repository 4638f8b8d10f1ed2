"""Which checkpoint a run goes on from: the one that is named, or the newest valid one of a run folder."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed

from nlgmoe.checkpoint.folder import everything_under, read_document
from nlgmoe.checkpoint.verify import agreed_problems
from nlgmoe.checkpoint.writing import recover


def choose(path: str | Path, to_train: bool = True) -> Path:
    """The checkpoint `path`; of a run folder, its newest valid checkpoint. Every rank has to call this.

    Ranks check a checkpoint together before any of them uses it, so that all have the same error. One process that is given
    a checkpoint reads it once, checking as it goes.

    Args:
        path: a checkpoint, or a folder with checkpoints somewhere in it.
        to_train: whether training goes on; a checkpoint that holds weights only is then of no use.

    Raises:
        ValueError: there is no valid checkpoint.
    """
    if is_checkpoint(path):
        if distributed.is_initialized() and (found := agreed_problems(path)):
            raise ValueError(f"{_summary(found)}; use another checkpoint")
        return Path(path)
    skipped = []
    all_of_them = _agreed_candidates(Path(path), to_train)
    for candidate in all_of_them:
        found = agreed_problems(candidate)
        if not found and to_train and "optimizer_groups" not in read_document(candidate):
            found = [f"{candidate} holds weights only"]
        if not found:
            step = read_document(candidate)["global_step"]
            rank_zero_info(f"newest checkpoint: {candidate}, step {step}")
            further = {one: other for one in all_of_them if (other := _step(one)) is not None and other > step}
            if further:
                last = max(further, key=further.__getitem__)
                rank_zero_warn(f"{last} is of step {further[last]}, but was saved earlier; name it to take that one")
            return candidate
        rank_zero_warn(f"skipping a checkpoint that cannot be used: {_summary(found)}")
        skipped.append(candidate.name)
    more = f" (skipped {', '.join(skipped)})" if skipped else ""
    raise ValueError(f"no valid checkpoint in {path}{more}; start the run anew in another folder")


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
    """Whether there is any under a folder, valid or not; one that a killed process was replacing counts."""
    return any(path.suffix == ".ckpt" or ".ckpt.replaced-" in path.name for path in everything_under(folder))


def candidates(folder: Path) -> list[Path]:
    """All checkpoints under a folder, valid or not, latest first; of links to the same one, one."""
    found: dict[str, Path] = {}
    for path in sorted(everything_under(folder)):
        if path.suffix == ".ckpt" and not path.name.startswith("."):
            found.setdefault(os.path.realpath(path), path)
    return sorted(found.values(), key=_saved_at, reverse=True)


def time_of_save(folder: Path) -> str:
    """Time stamp of a checkpoint that is saved now, in ISO format: checkpoints of a folder are ordered by it.

    Where the clock was set back, it is the moment after the newest one's.
    """
    now = datetime.now(UTC)
    found = candidates(folder)
    if found and (latest := _saved_at(found[0])) >= now.isoformat(timespec="microseconds"):
        now = datetime.fromisoformat(latest) + timedelta(microseconds=1)
    return now.isoformat(timespec="microseconds")


def _step(path: Path) -> int | None:
    try:
        return int(read_document(path)["global_step"])
    except (ValueError, KeyError, TypeError, OSError):
        return None


def _saved_at(path: Path) -> str:
    """When it was written; of a damaged one, what the file system says."""
    try:
        return str(read_document(path)["saved_at"])
    except (ValueError, KeyError, TypeError, OSError):
        return datetime.fromtimestamp(path.lstat().st_mtime, UTC).isoformat(timespec="microseconds")


def _agreed_candidates(folder: Path, to_train: bool) -> list[Path]:
    """Of rank 0, which first, if training goes on, cleans up after a killed process; a run that is alive may be evaluated."""
    found: list[list[Path]] = [[]]
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        if to_train:
            recover(folder)
        found = [candidates(folder)]
    if distributed.is_initialized():
        distributed.broadcast_object_list(found)
    return found[0]


def _summary(found: list[str]) -> str:
    return found[0] + (f" (and {len(found) - 1} more problems: nlgmoe verify lists them)" if len(found) > 1 else "")
