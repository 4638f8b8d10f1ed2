"""Runs of train.py that a comparison is made of: each in its folder, one thread each, kept once they are finished."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Of a Trainer that is timed: endless data, and nothing is written or printed beside what is measured.
QUIET: dict[str, Any] = {
    "max_epochs": -1,
    "use_distributed_sampler": False,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def train(
    config: str | Path,
    folder: Path,
    settings: Mapping[str, Any],
    resume: bool = False,
    root: Path = ROOT,
) -> dict[str, Any]:
    """Train unless the run's summary is there.

    Args:
        config: a YAML file, from `root`.
        folder: of the run, which becomes `trainer.default_root_dir`.
        settings: that override the file's, by name.
        resume: go on from the newest checkpoint in the folder, if there is one.
        root: of the tree whose code trains.

    Returns:
        What `summary.json` says.
    """
    if not (folder / "summary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "train.py", "fit", "--config", str(config), f"--trainer.default_root_dir={folder}"]
        command += [f"--{name}={value}" for name, value in settings.items()]
        command += ["--ckpt_path=auto"] if resume else []
        with (folder / "log.txt").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            code = subprocess.run(command, cwd=root, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            last = (folder / "log.txt").read_text().rstrip().rpartition("\n")[2]
            raise RuntimeError(f"{folder.name} ended with exit code {code}: {last} ({folder / 'log.txt'})")
    summary = json.loads((folder / "summary.json").read_text())
    print(
        f"{folder.name}: val_loss {summary['val_loss']:.4f}, {summary['tokens_per_second']:.0f} tokens/s",
        flush=True,
    )
    return summary


def budget(tokens: int | None) -> dict[str, Any]:
    """The settings of a run of `tokens` tokens instead of its configuration's."""
    return {} if tokens is None else {"model.train_tokens": tokens, "model.schedule.decay_tokens": tokens}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
