"""Whether a run that has no checkpoint may begin again: it may have ended before the first one was due."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from nlgmoe.files import require_regular
from nlgmoe.monitoring.table_file import number, read_rows


def step_past_first_save(folder: Path, keepers: Sequence[ModelCheckpoint]) -> int | None:
    """Return the last logged step of a run that has ended or must have saved a checkpoint; None if it may not have.

    Args:
        folder: of the run; `metrics.csv` in it says how far the run came.
        keepers: the run's; without any, a run that has logged a step counts as one that has saved.
    """
    require_regular(folder / "metrics.csv", "remove it")
    # Of the run itself: a callback may log something over other numbers than steps.
    rows = [
        row
        for row in read_rows(folder / "metrics.csv")
        if (row.get("train/loss") or row.get("val/loss")) and (row.get("step") or "").isdecimal()
    ]
    last = max(map(_step, rows), default=0)
    if not last:
        return None
    ended = (folder / "summary.json").exists()
    return last if ended or not keepers or any(_must_have_saved(one, rows, last) for one in keepers) else None


def _must_have_saved(keeper: ModelCheckpoint, rows: Sequence[Mapping[str, str | None]], last: int) -> bool:
    """Return whether a run that has logged `rows` must have saved by one of its `ModelCheckpoint`."""
    if keeper._every_n_train_steps:
        return last > keeper._every_n_train_steps
    if keeper._train_time_interval is not None:
        elapsed = [value for row in rows if (value := number(row.get("time/elapsed"))) is not None]
        return sum(one > keeper._train_time_interval.total_seconds() for one in elapsed) > 1  # steps after it was over
    validated = [_step(row) for row in rows if row.get("val/loss")]
    return keeper._every_n_epochs == 1 and not keeper._save_on_train_epoch_end and last > min(validated, default=last)


def _step(row: Mapping[str, str | None]) -> int:
    return int(row["step"] or 0)
