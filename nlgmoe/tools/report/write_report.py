"""The report of a run, written when `fit` ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from nlgmoe.tools.report.runs import read_runs

ARTIFACTS = ("config.yaml", "versions.json", "summary.json", "report.html")


class WriteReport(Callback):
    """Writes `report.html` into the run folder when `fit` ends, as `nlgmoe report` does, and prints its path.

    MLflow and Weights & Biases get it too, with the resolved configuration, the versions and the summary.
    """

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report, after the files of other callbacks; an error is only a warning."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        try:
            from nlgmoe.tools.report.page import write_report  # plotly

            file = write_report(read_runs([trainer.default_root_dir]))
        except Exception as error:
            remedy = f"write it with nlgmoe report {trainer.default_root_dir}"
            rank_zero_warn(f"no report of this run was written: {error}; {remedy}")
        else:
            rank_zero_info(f"report of this run: {file} (open it in a browser)\n")
        try:
            attach(trainer.loggers, Path(trainer.default_root_dir))
        except Exception as error:
            rank_zero_warn(f"the logger did not take the report of {trainer.default_root_dir}: {error}")


def attach(loggers: Iterable[Logger], folder: Path) -> None:
    """Give the loggers that keep files those of `ARTIFACTS` that a run folder has."""
    files = [folder / name for name in ARTIFACTS if (folder / name).is_file()]
    for logger in loggers:
        if isinstance(logger, MLFlowLogger):
            for file in files:
                logger.experiment.log_artifact(logger.run_id, str(file))
        elif isinstance(logger, WandbLogger):
            from wandb import Artifact

            artifact = Artifact(f"{logger.experiment.id}-files", type="run")
            for file in files:
                artifact.add_file(str(file))
            logger.experiment.log_artifact(artifact)
