"""The repository: its root, and git; the processor."""

import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def git(*words: str) -> str:
    """Run git in the repository, and return its output."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def commit() -> str:
    """Return the commit that is checked out, with `+` if code has changed; `unknown` in a copy without git's data."""
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py", "*.yaml") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def short(commit: str) -> str:
    """Return the first eight digits of a commit, with its `+`."""
    return commit[:8] + "+" * commit.endswith("+")


def processor() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
