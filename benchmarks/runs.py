"""The repository: its root, and git."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def git(*words: str) -> str:
    """Run git in the repository, and return its output."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
