"""Seconds until a command answers: whole processes, in turn, medians.

    python -m benchmarks.startup [--rounds 5]

`first step` is the quickstart's model until its first optimizer step has been taken, with its data prepared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import ROOT, interleaved, settings

QUICKSTART = ["train.py", "fit", "--config", "configs/quickstart.yaml"]
COMMANDS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import lightning.pytorch": ["-c", "import lightning.pytorch"],
    "nlgmoe --help": ["-m", "nlgmoe", "--help"],
    "nlgmoe verify --help": ["-m", "nlgmoe", "verify", "--help"],
    "nlgmoe inspect": ["-m", "nlgmoe", "inspect", "configs/quickstart.yaml"],
    "train.py fit --print_config": [*QUICKSTART, "--print_config"],
    "train.py fit, first step": [
        *QUICKSTART,
        *("--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"),
        *("--trainer.logger=false", "--trainer.callbacks=null", "--trainer.enable_progress_bar=false"),
    ],
}


def command(words: list[str], folder: str) -> Callable[[], None]:
    """A run of a command, each in a run folder of its own."""

    def run() -> None:
        own = [f"--trainer.default_root_dir={tempfile.mkdtemp(dir=folder)}"] if "--trainer.max_steps=1" in words else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *words, *own], cwd=ROOT, check=True, capture_output=True, env=environment)

    return run


def main() -> None:
    """Time the commands, print and write docs/results/startup.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = interleaved({name: command(words, folder) for name, words in COMMANDS.items()}, args.rounds, warm_up=1)
    for name, seconds in found.items():
        print(f"{name:<30} {seconds:6.2f} s")
    file = Path(ROOT / "docs/results/startup.json")
    file.write_text(json.dumps({**settings(rounds=args.rounds), "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
