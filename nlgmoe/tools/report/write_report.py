"""The run's report, when it ends."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from nlgmoe.tools.report.runs import read_runs


class WriteReport(Callback):
    """Writes `report.html` into the run folder when `fit` ends, and says where; what `nlgmoe report` would write."""

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, once all other callbacks have written theirs; a run that trained well does not fail for it."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        try:
            from nlgmoe.tools.report.page import write_report  # plotly

            file = write_report(read_runs([trainer.default_root_dir]))
        except Exception as error:
            rank_zero_warn(
                f"there is no report of this run: {error}; nlgmoe report {trainer.default_root_dir} writes it later"
            )
        else:
            rank_zero_info(f"report of this run: {file} (open it in a browser)\n")
