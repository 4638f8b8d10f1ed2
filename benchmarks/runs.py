"""Helpers of benchmarks that train: the trainer's options, and git."""

import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Options of a Trainer that is timed: endless data, no files, no output.
QUIET: dict[str, Any] = {
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def git(*words: str) -> str:
    """Run git in the repository, and return its output."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
