"""A collective of NCCL that waits for too long ends the run with one line."""

from __future__ import annotations

import threading

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from typing_extensions import override

from nlgmoe.parallel.abort_watch import AbortWatch

REMEDY = (
    "another rank has stopped or does not answer if a collective's timeout is reported above; what is wrong is its error, not "
    "this. For a rank that only needs longer, raise timeout_seconds of nlgmoe.ExpertParallelStrategy"
)


class ExplainAbort(Callback):
    """Prints a line if this rank is aborted while it has partners, and kills those that it has started.

    Where a rank hangs, PyTorch aborts the others (SIGABRT) after the timeout. The one that hangs would live on if it was started
    by one of them.
    """

    def __init__(self) -> None:
        self._watch: AbortWatch | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin; ranks have been started by now."""
        # Python handles signals in the main thread alone.
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            launcher = trainer.strategy.launcher
            ranks = launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []
            line = f"error: rank {trainer.global_rank} was aborted (SIGABRT): {REMEDY}"
            self._watch = AbortWatch(line, [process.pid for process in ranks])

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self.teardown(trainer, pl_module, "")
