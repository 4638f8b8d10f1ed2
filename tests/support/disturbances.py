"""Callbacks that disturb a run on ranks, named by their paths in settings."""

import os
import signal
import sys
import time
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Raises(Callback):
    """Fails on rank 1 in the second step; with `hangs`, rank 1 waits for ever instead."""

    def __init__(self, hangs: bool = False) -> None:
        self.hangs = hangs

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            if self.hangs:
                time.sleep(10_000)
            raise ValueError("rank 1 has had enough")


class TellsMain(Callback):
    """Rank 1 sends SIGTERM to the process that has started it, in the third step."""

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getppid(), signal.SIGTERM)


class KillsAllInASave(Callback):
    """Rank 0 kills all processes of its group while it writes the second checkpoint."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        written: set[str] = set()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            """Collect the files of moments, one a checkpoint; Python reports a call before it makes it (PEP 578)."""
            if event == "open" and ".ckpt.writing/optimizer" in str(arguments[0]):
                written.add(str(arguments[0]))
                if len(written) == 2:
                    os.killpg(os.getpgrp(), signal.SIGKILL)

        if trainer.global_rank == 0:
            sys.addaudithook(hook)
