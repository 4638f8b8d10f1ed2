"""The loggers of a run folder: `metrics.csv` and TensorBoard's event files, side by side, kept when a run is resumed."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from typing_extensions import override


def run_folder_loggers(folder: str | Path) -> list[Logger]:
    """What `train.py` logs to if the configuration names no logger."""
    return [RunCSVLogger(folder), TensorBoardLogger(folder, name="", version="")]


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
        temporary = os.path.join(self.log_dir, f".{self.NAME_METRICS_FILE}.writing")
        with open(self.metrics_file_path, newline="") as file, open(temporary, "w", newline="") as wider:
            writer = csv.DictWriter(wider, fieldnames)
            writer.writeheader()
            writer.writerows(csv.DictReader(file))
        os.replace(temporary, self.metrics_file_path)
