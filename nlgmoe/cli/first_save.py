"""Whether a run that has no checkpoint may begin again: it may have ended before the first one was due."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from nlgmoe.files import require_regular


def step_past_first_save(folder: Path, keepers: Sequence[ModelCheckpoint]) -> int | None:
    """Return the last logged step of a run that has ended or must have saved a checkpoint; None if it may not have.

    Args:
        folder: of the run; `metrics.csv` in it says how far the run came.
        keepers: the run's; without any, a run that has logged a step counts as one that has saved.
    """
    rows = _rows(folder / "metrics.csv")
    steps = [int(row["step"]) for row in rows]
    last = max(steps, default=0)
    if not last:
        return None
    ended = (folder / "summary.json").exists()
    return last if ended or not keepers or any(_must_have_saved(one, rows, last) for one in keepers) else None


def _must_have_saved(keeper: ModelCheckpoint, rows: Sequence[dict[str, str]], last: int) -> bool:
    """Return whether a run that has logged `rows` must have saved by one of its `ModelCheckpoint`."""
    if keeper._every_n_train_steps:
        return last > keeper._every_n_train_steps
    if keeper._train_time_interval is not None:
        elapsed = [value for row in rows if (value := _number(row.get("time/elapsed"))) is not None]
        return sum(one > keeper._train_time_interval.total_seconds() for one in elapsed) > 1  # steps after it was over
    validated = [int(row["step"]) for row in rows if row.get("val/loss")]
    return keeper._every_n_epochs == 1 and not keeper._save_on_train_epoch_end and last > min(validated, default=last)


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of `metrics.csv` that have a step; none without the file."""
    require_regular(path, "remove it")
    try:
        with path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]
    except OSError:
        return []
