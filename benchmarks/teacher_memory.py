"""What a teacher takes and gives back: memory of the process, and the time of a step, before it comes, with it and after.

    python -m benchmarks.teacher_memory [--rounds 30]

One run of the student of configs/mos/laptop.yaml on the pocket Pile. Its teacher, the model of configs/pr_moe/laptop.yaml, hardly
trained, comes after the first third and goes after the second, as `StagedDistillation` ends it. Memory is the process's resident
set after a phase's last step.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from benchmarks.runs import QUIET
from benchmarks.timing import ROOT, command_line, settings
from nlgmoe import Experiment, MoEGPTModule, StagedDistillation, load_config

PHASES = ("before", "with", "after")


def main() -> None:
    """Measure, print, write."""
    arguments = command_line(__doc__ or "", "teacher_memory", 30, [])
    with tempfile.TemporaryDirectory() as folder:
        teacher = _saved_teacher(Path(folder))
        student = load_config(ROOT / "configs/mos/laptop.yaml", data__data_dir=str(ROOT / "data/pocket_pile"))
        assert student.module.distiller is not None
        student.module.distiller.teacher = str(teacher)
        watch = Watch(arguments.rounds)
        staged = StagedDistillation(step=2 * arguments.rounds)
        _trainer(folder, 3 * arguments.rounds, staged, watch).fit(student.module, student.data)

    plain = watch.found["before"]
    print(f"{'teacher':<8} {'memory':>10} {'':>10} {'step':>8}")
    for phase, (megabytes, seconds) in watch.found.items():
        print(
            f"{phase:<8} {megabytes:7.1f} MB {megabytes - plain[0]:+7.1f} MB {seconds * 1e3:5.0f} ms {seconds / plain[1]:6.2f}"
        )
    print(f"the teacher's weights are {watch.weights:.1f} MB")
    result = {
        **settings(steps_of_a_phase=arguments.rounds, freed_memory_kept=arguments.freed_memory_kept),
        "teacher_megabytes": watch.weights,
        "megabytes": {phase: found[0] for phase, found in watch.found.items()},
        "seconds": {phase: found[1] for phase, found in watch.found.items()},
    }
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


class Watch(Callback):
    """Lets the teacher come late, and measures; to stand behind `StagedDistillation`.

    Attributes:
        found: phase -> megabytes of the process, median seconds of a step.
        weights: megabytes of the teacher's.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.found: dict[str, tuple[float, float]] = {}
        self.weights = 0.0
        self._seconds: list[float] = []
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the module load no teacher yet."""
        assert isinstance(pl_module, MoEGPTModule) and pl_module.distiller is not None
        pl_module.distiller.loss_weight = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Load it when its time has come."""
        assert isinstance(pl_module, MoEGPTModule) and pl_module.distiller is not None
        if batch_idx == self.steps:
            pl_module.distiller.start(pl_module.gpt, trainer)
            assert pl_module.distiller.model is not None
            parts = pl_module.distiller.model.parameters()
            self.weights = sum(part.numel() * part.element_size() for part in parts) / 1e6
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure."""
        self._seconds.append(time.perf_counter() - self._started)
        if len(self._seconds) == self.steps:
            phase = PHASES[len(self.found)]
            self.found[phase] = _resident_megabytes(), statistics.median(self._seconds)
            self._seconds = []


def _resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _trainer(folder: str | Path, steps: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        callbacks=list(callbacks),
        **QUIET,
    )


def _saved_teacher(folder: Path) -> Path:
    """A checkpoint after one step."""
    experiment: Experiment = load_config(
        ROOT / "configs/pr_moe/laptop.yaml", data__data_dir=str(ROOT / "data/pocket_pile")
    )
    trainer = _trainer(folder, 1)
    trainer.fit(experiment.module, experiment.data)
    trainer.save_checkpoint(folder / "teacher.ckpt", weights_only=True)
    return folder / "teacher.ckpt"


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
