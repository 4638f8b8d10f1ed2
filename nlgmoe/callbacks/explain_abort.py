"""A one-line explanation of aborts after a collective's timeout."""

from __future__ import annotations

import threading

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from typing_extensions import override

from nlgmoe.parallel.abort_watch import AbortWatch
from nlgmoe.parallel.launcher import outlive_launcher

REMEDY = (
    "another rank has stopped or does not answer if a collective's timeout is reported above; look for that rank's error. "
    "If the rank only needs more time, raise timeout_seconds of nlgmoe.ExpertParallelStrategy"
)


class ExplainAbort(Callback):
    """Prints a line if this rank is aborted in a run with several ranks, and kills the ranks that it started.

    If a rank hangs, PyTorch aborts the others (SIGABRT) after the timeout; a hanging rank started by one of them would remain.
    """

    def __init__(self) -> None:
        self._watch: AbortWatch | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start watching; all ranks have been started, and are connected."""
        if stage == "fit":  # a run is saved before it ends
            outlive_launcher()
        # Python handles signals only in the main thread.
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            launcher = trainer.strategy.launcher
            ranks = launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []
            line = f"error: rank {trainer.global_rank} was aborted (SIGABRT): {REMEDY}"
            self._watch = AbortWatch(line, [process.pid for process in ranks])

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self.teardown(trainer, pl_module, "")
