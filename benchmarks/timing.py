"""What the benchmarks share: candidates timed in turn in one process, and what the numbers depend on."""

from __future__ import annotations

import argparse
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

from nlgmoe.cli.memory import keep_compiled_kernels, keep_freed_memory
from nlgmoe.versions import versions

ROOT = Path(__file__).parents[1]


def interleaved(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each candidate. Rounds go through all of them, so that a noisy moment hits everyone."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    try:
        for turn in range(warm_up + rounds):
            for name, candidate in candidates.items():
                started = clock()
                candidate()
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                if turn >= warm_up:
                    seconds[name].append(clock() - started)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in seconds.items()}


def settings(**more: Any) -> dict[str, Any]:
    """Machine, threads, allocator, versions and commit."""
    model = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return {
        "cpu": model.partition(": ")[2] or model,
        "threads": torch.get_num_threads(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "MKL_", "KMP_", "GOMP_", "MALLOC_", "LD_PRELOAD"))
        },
        "commit": output_of(["git", "describe", "--always", "--dirty"]),
        "versions": versions(),
        **more,
    }


def output_of(command: list[str]) -> str:
    """What a command prints; empty if it fails, or is not installed."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def command_line(description: str, name: str, rounds: int, parts: list[str]) -> argparse.Namespace:
    """Parse the options that the benchmarks of speed share, and set threads and allocator; arguments as `parser_of`."""
    return parse(parser_of(description, name, rounds, parts))


def parser_of(description: str, name: str, rounds: int, parts: list[str]) -> argparse.ArgumentParser:
    """Those options, for a benchmark to add its own.

    Args:
        description: of the benchmark.
        name: of its file in docs/results.
        rounds: how many by default.
        parts: it consists of.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--default-malloc", action="store_true", help="let the C library unmap what is freed")
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--output", default=str(ROOT / f"docs/results/{name}.json"), help="where the JSON goes")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; threads and allocator are set as they say."""
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_compiled_kernels()
    arguments.freed_memory_kept = not arguments.default_malloc and keep_freed_memory()  # as train.py does
    return arguments
