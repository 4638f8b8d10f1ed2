"""The path of docs/fine_tune.md with the real model: nightly."""

import subprocess
import sys
from pathlib import Path

from benchmarks.runs import ROOT


def test_real_model_takes_all_its_steps(tmp_path: Path) -> None:
    # In a process of its own, whose memory and that of its commands is measured.
    command = [sys.executable, "-m", "benchmarks.real_model", "--folder", str(tmp_path / "real_model")]
    subprocess.run(command, cwd=ROOT, check=True)
