"""The report of a run, written when `fit` ends."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from nlgmoe.tools.report.runs import read_runs


class WriteReport(Callback):
    """Writes `report.html` into the run folder when `fit` ends, as `nlgmoe report` does, and prints its path."""

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report, after the files of other callbacks; an error is only a warning."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
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
