"""The run folder, `trainer.default_root_dir`: settings, tables and checkpoints of one sequence of steps.

    config.yaml  versions.json       settings and versions of the newest start
    starts/step-N.yaml               settings that held from step N on
    metrics.csv  expert_load.csv     tables; a resumed run cuts them to its step
    checkpoints/step-N.ckpt          written once, never replaced; last.ckpt and best.ckpt are links to two of them
    summary.json                     results of a run that has ended

`trainer.py` decides which of the checkpoints is resumed; TensorBoard's event files are continued too.
"""

import copy
import csv
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from typing_extensions import override

from nlgmoe.checkpoint.run_checkpoints import FOLDER
from nlgmoe.files import atomic_write, write_json
from nlgmoe.lightning_state import csv_writer_of
from nlgmoe.versions import versions

METRICS = "metrics.csv"


class RunFolder(SaveConfigCallback):
    """Writes settings and versions into the run folder, and cuts `metrics.csv` when a run is resumed."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write neither settings nor rows of tables in an evaluation."""
        self._rows: int | None = 0  # to keep
        self.already_saved = stage != "fit"
        for logger in trainer.loggers:
            if hasattr(logger, "records"):  # of `RunCSVLogger`
                logger.records = stage == "fit"

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING and is_of_folder(checkpoint["path"], trainer.default_root_dir):
            self._rows = checkpoint.get("rows")  # None: all

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:  # whose number is saved
            checkpoint["rows"] = count_rows(Path(trainer.default_root_dir, METRICS))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut `metrics.csv` to the rows that the checkpoint counts; a new run begins without any."""
        if trainer.is_global_zero:
            cut_rows(Path(trainer.default_root_dir, METRICS), self._rows)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the settings before the first step: by then all checks, such as the teacher's, have passed."""
        if not self.already_saved:
            self.save_config(trainer, pl_module, "fit")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the settings of a run that was resumed at its end, and has only validated."""
        if not self.already_saved:
            self.save_config(trainer, pl_module, "fit")

    @override
    @rank_zero_only
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml` and `versions.json`, and a file of `starts/` if one of them has changed.

        The configuration repeats the run from its beginning, so it omits the resumed checkpoint.
        """
        self.already_saved = True
        folder, config, packages = Path(trainer.default_root_dir), copy.deepcopy(self.config), versions()
        config.pop("ckpt_path", None)  # a null here would replace an earlier --ckpt_path
        text = self.parser.dump(config, skip_none=False)
        start = f"# {json.dumps(packages)}\n{text}"
        (folder / "starts").mkdir(parents=True, exist_ok=True)
        step, earlier = trainer.global_step, ""
        for changed_at, file in starts_of(folder):
            if changed_at > step or step == 0:
                file.unlink()
            else:
                earlier = file.read_text(encoding="utf-8")
        if earlier != start:
            with atomic_write(folder / "starts" / f"step-{step}.yaml") as file:
                file.write_text(start, encoding="utf-8")
        flat = flattened(config.as_dict())  # so that runs can be filtered by a learning rate
        flat["config"] = ", ".join(map(str, config.get("config") or ()))  # paths of the files
        plain = {name: v if isinstance(v, bool | int | float | str | None) else str(v) for name, v in flat.items()}
        with atomic_write(folder / "config.yaml") as file:
            file.write_text(text, encoding="utf-8")
        write_json(folder / "versions.json", packages)
        for logger in trainer.loggers:
            try:
                logger.log_hyperparams(plain)
            except Exception as error:
                if step == 0:
                    raise
                # MLflow refuses settings that have changed since the run began.
                rank_zero_warn(f"{type(logger).__name__} did not take all settings: {error}")


def flattened(settings: Any, name: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names, such as `trainer.callbacks.0.class_path`; lists of scalars are kept."""
    if isinstance(settings, list) and any(isinstance(item, dict) for item in settings):
        settings = dict(enumerate(settings))
    if not isinstance(settings, dict) or not settings:
        return {name: settings} if name else {}
    inside = (flattened(value, f"{name}.{key}".removeprefix(".")) for key, value in settings.items())
    return {path: value for part in inside for path, value in part.items()}


def starts_of(folder: Path) -> list[tuple[int, Path]]:
    """Return the steps at which settings changed, and the files that hold them, in ascending order."""
    matches = (re.fullmatch(r"step-(\d+)\.yaml", path.name) for path in (folder / "starts").glob("*"))
    return sorted((int(match[1]), folder / "starts" / match[0]) for match in matches if match)


def is_of_folder(checkpoint: str | Path, folder: str | Path) -> bool:
    """Return True if a checkpoint is one of a run folder's own; False if the run in this folder is a fork of another."""
    return is_same_path(Path(checkpoint).parent, Path(folder, FOLDER))


def count_rows(table: Path) -> int:
    """Return the number of rows of a CSV file, without its header; 0 if there is no file."""
    return max(0, table.read_bytes().count(b"\n") - 1) if table.is_file() else 0


def cut_rows(table: Path, rows: int | None) -> int:
    """Keep the header and the first `rows` rows of a CSV file, None: all that are complete; without a row, remove it.

    Returns the number of rows that it has then.
    """
    complete = count_rows(table)
    rows = complete if rows is None else min(rows, complete)
    if rows == 0:
        table.unlink(missing_ok=True)
    else:
        with table.open("rb+") as file:
            for _ in range(1 + rows):
                file.readline()
            file.truncate(file.tell())
    return rows


def is_same_path(path: str | Path, other: str | Path) -> bool:
    """Return True if two paths lead to the same file."""
    return os.path.realpath(path) == os.path.realpath(other)


def run_folder_loggers(folder: str | Path) -> list[Logger]:
    """Return the loggers that `train.py` uses if the configuration names none."""
    return [RunCSVLogger(folder), TensorBoardLogger(folder, name="", version="", default_hp_metric=False)]


def with_run_csv(loggers: Logger | Sequence[Logger], folder: str | Path, trains: bool) -> list[Logger]:
    """Replace loggers of the run folder's `metrics.csv`, which would delete the rows of a resumed run, by `RunCSVLogger`.

    Args:
        trains: if false, the file gets no logger, since its rows belong to training.
    """
    given = [loggers] if isinstance(loggers, Logger) else loggers
    others = [each for each in given if not (isinstance(each, CSVLogger) and is_same_path(each.log_dir, folder))]
    return [*others, RunCSVLogger(folder)] if trains else others


class RunCSVLogger(CSVLogger):
    """Writes `metrics.csv` into `folder` and continues an existing file (Lightning's own logger deletes it).

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
        return csv_writer_of(self, _AppendingWriter)


class _AppendingWriter(ExperimentWriter):
    @override
    def _check_log_dir_exists(self) -> None:
        """Read the columns of an existing file, and discard an incomplete last row."""
        if cut_rows(Path(self.metrics_file_path), None):
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = next(csv.reader(file))

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Add columns atomically: the base class empties the file first, so a crash would lose all rows."""
        path = Path(self.metrics_file_path)
        with atomic_write(path) as temporary, path.open(newline="") as file, temporary.open("w", newline="") as wider:
            writer = csv.DictWriter(wider, fieldnames)
            writer.writeheader()
            writer.writerows(csv.DictReader(file))
