"""The loggers of a run folder, `metrics.csv` and TensorBoard's event files, both continued by a resumed run.

With helpers for callbacks that log: the steps to log at (`trainer.log_every_n_steps`), sums over ranks, images.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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


def log_image(loggers: Iterable[Logger], name: str, draw: Callable[[], np.ndarray], step: int) -> None:
    """Log an image to every logger that takes images: TensorBoard, and loggers with `log_image`, such as W&B's.

    Args:
        loggers: the trainer's loggers, on the process that logs.
        name: name of the image.
        draw: returns the image, `[height, width, 3]` uint8; not called if no logger takes images.
        step: the logger's step.
    """
    image: np.ndarray | None = None
    for logger in loggers:
        add = getattr(getattr(logger, "experiment", None), "add_image", None)  # TensorBoard's SummaryWriter
        log = getattr(logger, "log_image", None)
        if image is None and (callable(add) or callable(log)):
            image = draw()
        if callable(add):
            add(name, image, global_step=step, dataformats="HWC")
        elif callable(log):
            log(key=name, images=[image], step=step)


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
        """Write a row if `records` is true."""
        if self.records:
            super().log_metrics(metrics, step)

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the writer, created at first use."""
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


WIDTH, ROW, GAP = 512, 24, 2  # pixels of a heat map
DOUBLINGS = 2.0  # colours saturate at 4 times and a quarter of the fair share
IDLE, FAIR, BUSY = (np.array(colour, dtype=float) for colour in ((33, 102, 172), (247, 247, 247), (178, 24, 43)))
DEAD = np.zeros(3)


def heat_map(loads: Sequence[np.ndarray]) -> np.ndarray:
    """Draw loads as colours: white is the fair share (uniform load), red more, blue less, black zero.

    Args:
        loads: `[E]` for each layer, in any unit; layers may differ in E.

    Returns:
        `[height, width, 3]` uint8, the first layer on top.
    """
    rows = []
    for load in loads:
        cells = load[np.arange(WIDTH) * len(load) // WIDTH] / max(load.mean(), 1e-9)  # [width]
        scale = np.log2(np.clip(cells, 2**-DOUBLINGS, 2**DOUBLINGS))[:, None] / DOUBLINGS  # [width, 1] in [-1, 1]
        colours = FAIR + np.where(scale > 0, BUSY - FAIR, IDLE - FAIR) * np.abs(scale)
        colours[cells == 0] = DEAD
        row = np.repeat(colours[None], ROW, axis=0)
        rows.append(np.concatenate([row, np.full((GAP, WIDTH, 3), 255.0)]))
    return np.concatenate(rows)[:-GAP].round().astype(np.uint8)


def is_logged(trainer: Trainer) -> bool:
    """Return True for a step that Lightning logs; the last step of a run too, once it is known to be the last."""
    return trainer._logger_connector.should_update_logs
