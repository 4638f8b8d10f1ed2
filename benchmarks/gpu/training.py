"""Step `training`: the quickstart against a run of it that was recorded on a CPU; saved, verified, resumed on GPU and CPU.

Tokens are not dropped: which ones are is drawn on the device, and a GPU draws other ones than a CPU.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from benchmarks.gpu.run import ROOT, Run
from benchmarks.timing import settings
from nlgmoe import load_config
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.files import write_json

RECORD = Path(__file__).with_name("quickstart_on_cpu.json")
PRECISIONS = ("32-true", "bf16-mixed")
STEPS, MORE = 200, 10
COMPARED = 20  # losses of the last steps, averaged: the batches are the same ones


class Losses(Callback):
    """Collects the loss of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read it."""
        self.found.append(float(trainer.callback_metrics["train/loss"]))


@dataclass(frozen=True)
class Fitted:
    """The losses of a run's steps, and that of the validation at its end."""

    losses: list[float]
    validation: float
    trainer: Trainer


def fit(
    data: Path, folder: Path, accelerator: str, precision: str, steps: int, windows: int, checkpoint: Path | None = None
) -> Fitted:
    """Train the quickstart up to step `steps`, from the start or from a checkpoint, and validate on so many windows."""
    experiment = load_config(
        ROOT / "configs/quickstart.yaml",
        model__config__moe__token_dropping=False,
        model__train_tokens=2_000_000,  # those of the recorded run
        model__schedule__warmup_tokens=200_000,
        model__schedule__decay_tokens=2_000_000,
        data__data_dir=str(data),
        data__max_eval_windows=windows,
        trainer__accelerator=accelerator,
        trainer__precision=precision,
        trainer__max_steps=steps,
        trainer__val_check_interval=steps,
        trainer__default_root_dir=str(folder),
        trainer__callbacks=[],
        trainer__logger=False,
        trainer__enable_checkpointing=False,
        trainer__enable_progress_bar=False,
    )
    losses = Losses()
    experiment.trainer.callbacks.append(losses)  # type: ignore[attr-defined]
    experiment.trainer.fit(experiment.module, experiment.data, ckpt_path=checkpoint)
    return Fitted(losses.found, float(experiment.trainer.callback_metrics["val/loss"]), experiment.trainer)


def training(run: Run, folder: Path) -> None:
    """Compare."""
    recorded = json.loads(RECORD.read_text())["losses"]
    steps, more, windows = (4, 2, 4) if run.dry else (STEPS, MORE, 64)
    for precision in PRECISIONS:
        fitted = fit(run.data, folder / precision, run.accelerator, precision, steps, windows)
        run.correct(
            f"loss of steps {max(0, steps - COMPARED)} to {steps}, {precision}, off the recorded one",
            abs(_last(fitted.losses) - _last(recorded[:steps])),
            at_most=1e-2,
        )
        if precision != "32-true":
            continue
        checkpoint = folder / "saved.ckpt"
        fitted.trainer.save_checkpoint(checkpoint)
        run.correct("problems that verify finds", len(list(find_problems(checkpoint))))
        here, there = (
            fit(run.data, folder / name, where, precision, steps + more, windows, checkpoint)
            for name, where in (("resumed", run.accelerator), ("resumed on a CPU", "cpu"))
        )
        difference = abs(here.validation - there.validation) / there.validation
        run.correct(f"evaluation {more} steps after resuming, GPU off CPU", difference, at_most=1e-4)


def record(data: Path) -> None:
    """Write the losses of a CPU run that the others are held against."""
    with tempfile.TemporaryDirectory() as folder:
        losses = fit(data, Path(folder), "cpu", "32-true", STEPS, 4).losses
    write_json(RECORD, {"losses": losses, **settings(command="python -m benchmarks.gpu --record")})


def _last(losses: Sequence[float]) -> float:
    return statistics.mean(losses[-COMPARED:])
