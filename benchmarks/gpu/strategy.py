"""Step `strategy`: `ExpertParallelStrategy` on one GPU: every ZeRO stage, bf16 and fp16, offload, a signal, and back on a CPU."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint

from benchmarks.gpu.run import Run, quiet_trainer
from benchmarks.gpu.training import Losses
from nlgmoe.callbacks import SaveCheckpoints
from nlgmoe.checkpoint.portable import load_model
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.param_groups import AdamWConfig
from nlgmoe.parallel.strategy import ExpertParallelStrategy
from tests.synthetic import SyntheticData

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "ZeRO 1, bf16": ("bf16-mixed", {"stage": 1}),
    "ZeRO 2, bf16": ("bf16-mixed", {"stage": 2}),
    "ZeRO 1, fp16": ("16-mixed", {"stage": 1}),
    "ZeRO 2, bf16, offload": ("bf16-mixed", {"stage": 2, "offload_optimizer": True}),
}
STOPPED = "ZeRO 2, bf16"


class Stop(Callback):
    """Sends this process SIGTERM in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Send it."""
        if batch_idx == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Cell:
    """The same small model on the same batches, under a strategy and a precision."""

    def __init__(self, run: Run, folder: Path, precision: str, options: dict[str, Any] | None) -> None:
        self.run, self.folder, self.precision, self.options = run, folder, precision, options
        self.steps = 4 if run.dry else 20
        width, length = (32, 16) if run.dry else (256, 256)
        moe = MoEConfig([4, 8], mlp_type="residual", token_dropping=False)
        self.config = GPTConfig(257, length, 4, width, 4, init_std=0.05, moe=moe)

    @property
    def data(self) -> SyntheticData:
        """From the first sample on."""
        return SyntheticData(257, self.config.seq_len, 8)

    def fit(self, *callbacks: Callback, checkpoint: Path | None = None) -> tuple[list[float], Trainer]:
        """The losses of the steps."""
        losses = Losses()
        trainer: Any = quiet_trainer(
            self.run,
            self.folder,
            strategy="auto" if self.options is None else ExpertParallelStrategy(**self.options),
            precision=self.precision,
            max_steps=self.steps,
            val_check_interval=self.steps,
            check_val_every_n_epoch=None,
            callbacks=[losses, *callbacks],
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        )
        trainer.fit(MoEGPTModule(self.config, AdamWConfig(lr=1e-3)), self.data, ckpt_path=checkpoint)
        return losses.found, trainer


def strategy(run: Run, folder: Path) -> None:
    """Compare with one process without it, in fp32."""
    expected, _ = Cell(run, folder, "32-true", None).fit()
    for name, (precision, options) in CELLS.items():
        cell, figure = Cell(run, folder, precision, options), f"losses off fp32 without the strategy, {name}"
        if run.dry and precision == "16-mixed":
            run.correct(figure, None, at_most=1e-2)  # DeepSpeed has no fp16 on a CPU
            continue
        losses, trainer = cell.fit()
        run.correct(figure, off(losses, expected), at_most=1e-2)
        if name == STOPPED:
            path = folder / "end.ckpt"
            trainer.save_checkpoint(path)
            there = evaluated_on_cpu(cell, path)
            here = float(trainer.callback_metrics["val/loss"])
            run.correct("evaluation of its checkpoint on a CPU, off here", abs(there - here) / there, at_most=1e-2)
            run.correct("losses after a signal and a resume, off without", stopped(cell, losses), at_most=1e-2)


def off(found: list[float], expected: list[float]) -> float:
    """Largest relative difference of a step's loss; infinite if steps are missing."""
    if len(found) != len(expected):
        return float("inf")
    return max(abs(one - other) / other for one, other in zip(found, expected, strict=True))


def evaluated_on_cpu(cell: Cell, path: Path) -> float:
    """The loss of a checkpoint in fp32, without trainer and strategy."""
    model, losses = load_model(path), []
    for batch in cell.data.val_dataloader():
        logits = model.logits(model(batch["tokens"]).hidden).flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, batch["targets"].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())


def stopped(cell: Cell, undisturbed: list[float]) -> float:
    """Be told to stop in the third step, go on from what was saved, and compare the steps after it."""
    try:
        cell.fit(Stop(2), SaveCheckpoints())
    except SystemExit as end:
        assert end.code == 0, f"the stopped run ended with {end.code}"
    losses, _ = cell.fit(checkpoint=cell.folder / "checkpoints" / "last.ckpt")
    return off(losses, undisturbed[3:])
