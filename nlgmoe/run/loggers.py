"""The loggers of a run folder, `metrics.csv` and TensorBoard's event files, both continued by a resumed run.

`is_logged` tells callbacks at which steps to log.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from typing_extensions import override

from nlgmoe.files import atomic_write


def run_folder_loggers(folder: str | Path) -> list[Logger]:
    """Return the loggers that `train.py` uses if the configuration names none."""
    return [RunCSVLogger(folder), TensorBoardLogger(folder, name="", version="", default_hp_metric=False)]


def with_run_csv(loggers: Logger | Sequence[Logger], folder: str | Path, trains: bool) -> list[Logger]:
    """Replace loggers of the run folder's `metrics.csv`, which would delete the rows of a resumed run, by `RunCSVLogger`.

    Args:
        loggers: those of a configuration.
        folder: the run folder.
        trains: if false, the file gets no logger, since its rows belong to training.
    """
    others = [
        logger
        for logger in ([loggers] if isinstance(loggers, Logger) else loggers)
        if not (isinstance(logger, CSVLogger) and os.path.realpath(logger.log_dir) == os.path.realpath(folder))
    ]
    return [*others, RunCSVLogger(folder)] if trains else others


class RunCSVLogger(CSVLogger):
    """Writes `metrics.csv` into `folder` and continues an existing file (Lightning's own logger deletes it).

    Args:
        folder: the run folder.

    Attributes:
        records: if false, rows are not written: evaluations of other checkpoints or text are not rows of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, name="", version="")
        self.records = True

    @override
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self.records:
            super().log_metrics(metrics, step)

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment


class _AppendingWriter(ExperimentWriter):
    @override
    def _check_log_dir_exists(self) -> None:
        """Read the columns of an existing file, and discard an incomplete last row."""
        if os.path.exists(self.metrics_file_path):
            with open(self.metrics_file_path, "rb+") as binary_file:
                binary_file.truncate(binary_file.read().rfind(b"\n") + 1)
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Add columns atomically: the base class empties the file first, so a crash would lose all rows."""
        path = Path(self.metrics_file_path)
        with atomic_write(path) as temporary, path.open(newline="") as file, temporary.open("w", newline="") as wider:
            writer = csv.DictWriter(wider, fieldnames)
            writer.writeheader()
            writer.writerows(csv.DictReader(file))


def is_logged(trainer: Trainer) -> bool:
    """Return True for a step that Lightning logs; the last step of a run too, once it is known to be the last."""
    return trainer._logger_connector.should_update_logs
