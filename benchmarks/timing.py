"""What the benchmarks share: candidates timed in turn in one process, and what the numbers depend on."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nlgmoe.versions import versions

ROOT = Path(__file__).parents[1]


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict[str, float]:
    """Median seconds of each candidate. Rounds go through all of them, so that a noisy moment hits everyone."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    try:
        for turn in range(warm_up + rounds):
            for name, candidate in candidates.items():
                started = time.perf_counter()
                candidate()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn >= warm_up:
                    seconds[name].append(time.perf_counter() - started)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in seconds.items()}


def settings(**more: Any) -> dict[str, Any]:
    """Machine, threads, allocator, versions and commit."""
    model = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": model.partition(": ")[2] or model,
        "threads": torch.get_num_threads(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "MKL_", "KMP_", "GOMP_", "MALLOC_", "LD_PRELOAD"))
        },
        "commit": commit.stdout.strip(),
        "versions": versions(),
        **more,
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
