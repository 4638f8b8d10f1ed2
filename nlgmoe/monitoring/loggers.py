"""The loggers of a run folder: `metrics.csv` and TensorBoard's event files, side by side, kept when a run is resumed."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from typing_extensions import override

from nlgmoe.files import atomic_write


def run_folder_loggers(folder: str | Path) -> list[Logger]:
    """What `train.py` logs to if the configuration names no logger."""
    return [RunCSVLogger(folder), TensorBoardLogger(folder, name="", version="")]


def with_run_csv(loggers: Logger | Sequence[Logger], folder: str | Path) -> list[Logger]:
    """The loggers of a configuration, and `metrics.csv` of the run folder beside them: reports are made of it.

    Another logger that would write that file gives way to `RunCSVLogger`: it would delete the rows of a run that is resumed.
    """
    own = [one for one in _as_list(loggers) if isinstance(one, RunCSVLogger) and _writes_into(folder, one)]
    return [*without_run_csv(loggers, folder), *(own or [RunCSVLogger(folder)])]


def without_run_csv(loggers: Logger | Sequence[Logger], folder: str | Path) -> list[Logger]:
    """The loggers of a configuration, but those of `metrics.csv` in the run folder: its rows are the training's."""
    return [one for one in _as_list(loggers) if not _writes_into(folder, one)]


def _as_list(loggers: Logger | Sequence[Logger]) -> list[Logger]:
    return [loggers] if isinstance(loggers, Logger) else list(loggers)


def _writes_into(folder: str | Path, logger: Logger) -> bool:
    return isinstance(logger, CSVLogger) and os.path.realpath(logger.log_dir) == os.path.realpath(folder)


def log_image(loggers: Iterable[Logger], name: str, draw: Callable[[], np.ndarray], step: int) -> None:
    """Give a picture to every logger that takes one: TensorBoard's kind, and those with Lightning's `log_image`, such as W&B's.

    Args:
        loggers: of a trainer, on the process that logs.
        name: of the picture.
        draw: makes it, `[height, width, 3]` uint8; only called if it is wanted.
        step: as the logger counts.
    """
    takers: list[Callable[[np.ndarray], Any]] = []
    for logger in loggers:
        if callable(add := getattr(getattr(logger, "experiment", None), "add_image", None)):
            takers.append(partial(add, name, global_step=step, dataformats="HWC"))
        elif callable(log := getattr(logger, "log_image", None)):
            takers.append(partial(_log_one, log, name, step))
    if takers:
        image = draw()
        for take in takers:
            take(image)


def _log_one(log: Callable[..., Any], name: str, step: int, image: np.ndarray) -> None:
    log(key=name, images=[image], step=step)


class RunCSVLogger(CSVLogger):
    """Writes `metrics.csv` into `folder`; a file that is there goes on (Lightning's own logger deletes it).

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, name="", version="")

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made at first use."""
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment


class _AppendingWriter(ExperimentWriter):
    @override
    def _check_log_dir_exists(self) -> None:
        """Take over the columns of an earlier part of the run, and drop a last row that a full disk has cut off."""
        if os.path.exists(self.metrics_file_path):
            with open(self.metrics_file_path, "rb+") as rows:
                rows.truncate(rows.read().rfind(b"\n") + 1)
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Add columns to the file, whole or not at all: the base class empties it first, and a crash would lose all rows."""
        path = Path(self.metrics_file_path)
        with atomic_write(path) as temporary, path.open(newline="") as file, temporary.open("w", newline="") as wider:
            writer = csv.DictWriter(wider, fieldnames)
            writer.writeheader()
            writer.writerows(csv.DictReader(file))
