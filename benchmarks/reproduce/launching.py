"""Start runs of `configs/reproduce`: their size, their settings, and a process for each."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.reproduce.cells import BUDGETS, COOLDOWN, STEP_TOKENS, STEPS
from nlgmoe.validation import RunError

CONFIGS = Path("configs/reproduce")
Launch = Callable[[list[str], Path, Path], int]  # command of nlgmoe or train.py, log file, tree -> exit code


@dataclass(frozen=True)
class Scale:
    """The size of the runs.

    Attributes:
        name: `cpu`, or `tiny` for a test.
        steps: optimizer steps of the whole budget.
        step_tokens: tokens of a step.
        settings: override those of the files, nested as in YAML.
    """

    name: str
    steps: int
    step_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def milestones(self) -> int:
        """Steps between the checkpoints that shorter runs start from."""
        return round(min(BUDGETS) * (1 - COOLDOWN) * self.steps)


CPU = Scale("cpu", STEPS, STEP_TOKENS)
TINY = Scale(
    "tiny",
    20,
    2 * 16,
    {
        "model": {"config": {"seq_len": 16, "hidden_size": 16}},
        "data": {"micro_batch_size": 2, "max_eval_windows": 8},
    },
)


_running: set[subprocess.Popen[bytes]] = set()


def launch(command: list[str], log: Path, tree: Path) -> int:
    """Run a command with one thread in a process of its own."""
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with (
        log.open("a") as file,
        subprocess.Popen(
            [sys.executable, *command], cwd=tree, stdout=file, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        _running.add(process)
        code = process.wait()
        _running.discard(process)
        return code


def end_running() -> None:
    """Let the commands of `launch` save a checkpoint and end."""
    for process in list(_running):
        process.terminate()


def call(run: Launch, command: list[str], log: Path, tree: Path) -> None:
    """Run a command.

    Raises:
        RunError: it failed; the message has the last line of its log.
    """
    if code := run(command, log, tree):
        lines = log.read_text().rstrip().splitlines() if log.exists() else []
        raise RunError(f"{log.parent.name} ended with exit code {code}: {lines[-1] if lines else ''} ({log})")


def fit(run: Launch, files: Iterable[Path | str], folder: Path, tree: Path, start: str = "auto") -> dict[str, Any]:
    """Train a run, or resume it, and return its summary.

    Args:
        run: starts a command.
        files: of settings, or their text as JSON.
        folder: of the run.
        tree: folder of the code.
        start: the checkpoint that it begins from, unless `folder` has some; `auto`: random weights.
    """
    start = "auto" if (folder / "checkpoints").exists() else start
    command = ["train.py", "fit", *(part for file in files for part in ("--config", str(file)))]
    command += [f"--trainer.default_root_dir={folder}", f"--ckpt_path={start}"]
    call(run, command, folder / "log.txt", tree)
    if not (folder / "summary.json").exists():
        raise RunError(f"{folder.name} was stopped; start the command again, and it goes on")
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def run_settings(scale: Scale, tree: Path, steps: int, seed: int, rate: float) -> dict[str, Any]:
    """Return the settings of a run besides the files of configs/reproduce.

    Args:
        scale: size of the runs.
        tree: folder of the code, with its data.
        steps: optimizer steps; the last of them are the cooldown.
        seed: of weights and order.
        rate: learning rate.
    """
    (checkpoint,) = yaml.safe_load((tree / CONFIGS / "base.yaml").read_text())["trainer"]["callbacks"]
    interval = "milestones" if "milestones" in checkpoint["init_args"] else "every_n_train_steps"  # before 0.4
    checkpoint["init_args"][interval] = scale.milestones
    tokens = steps * scale.step_tokens
    return {
        "model": {
            **scale.settings.get("model", {}),
            "seed": seed,
            "optimizer": {"lr": rate},
            "train_tokens": tokens,
            "schedule": {
                "warmup_tokens": scale.steps // 40 * scale.step_tokens,
                "decay_tokens": tokens,
                "cooldown_tokens": round(COOLDOWN * steps) * scale.step_tokens,
            },
        },
        "data": {**scale.settings.get("data", {}), "seed": seed, "data_dir": str(tree / "data/pocket_pile")},
        "trainer": {**scale.settings.get("trainer", {}), "callbacks": [checkpoint]},
    }


def machine() -> str:
    """Return the processor, and what a run has of it."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, one thread a run"
