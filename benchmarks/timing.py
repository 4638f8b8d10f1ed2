"""Shared by the benchmarks: timing of candidates in turn in one process, results in a JSON file and in a page.

A benchmark consists of parts, each with a table of its own. `docs/results/NAME.json` keeps what each part measured, and the
table is written between `<!-- bench: NAME PART -->` and `<!-- end of bench -->` of a page in `docs/results`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.documents import markdown_table, with_text
from benchmarks.runs import ROOT, commit, processor, short
from nlgmoe.files import write_json
from nlgmoe.process import keep_freed_memory
from nlgmoe.versions import versions

RESULTS = ROOT / "docs" / "results"
END = "<!-- end of bench -->"

Table = tuple[Sequence[object], list[Sequence[object]]]
"""Head and rows."""


@dataclass(frozen=True)
class Part:
    """A measurement.

    Attributes:
        measure: takes the number of rounds, and returns the values for the JSON file.
        table: of what was measured.
        rounds: default number of rounds; `--rounds 1` tests the benchmark.
        threads: of PyTorch.
    """

    measure: Callable[[int], Any]
    table: Callable[[Any], Table]
    rounds: int = 1
    threads: int = 2


@dataclass(frozen=True)
class Benchmark:
    """Parts whose tables are in one page.

    Attributes:
        name: of the module and of the JSON file.
        page: in docs/results.
        parts: by name.
    """

    name: str
    page: str
    parts: Mapping[str, Part]

    def text(self, part: str, result: Mapping[str, Any]) -> str:
        """Return command, commit and machine in a line, and the table below it."""
        about, rounds = result["about"], result["about"].get("rounds", 1)
        where = f"{about['cpu']}, {about['threads']} thread{'s' if about['threads'] > 1 else ''}"
        medians = f", medians of {rounds} rounds" if rounds > 1 else ""
        line = f"`{about['command']}`, commit {short(about['commit'])}, {where}{medians}:"
        return f"{line}\n\n{markdown_table(*self.parts[part].table(result['measured']))}"

    def in_page(self, page: str, results: Mapping[str, Any]) -> str:
        """Return the page with the tables of all parts that have results."""
        for part in results:
            page = with_text(
                page, f"<!-- bench: {self.name} {part} -->", END, self.text(part, results[part]), self.page
            )
        return page

    def run(self, description: str, argv: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
        """Measure the parts asked for; print their tables, and write the JSON file and the page in `folder`."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--only", nargs="+", choices=self.parts, metavar="PART", help=f"of {', '.join(self.parts)}")
        parser.add_argument("--rounds", type=int, help="of each part; 1: a test of the benchmark")
        parser.add_argument("--tables", action="store_true", help="measure nothing; write the tables of the JSON file")
        arguments = parser.parse_args(argv)
        keep_freed_memory()  # as train.py does
        file, page = folder / f"{self.name}.json", folder / self.page
        before = json.loads(file.read_text()) if file.exists() else {}
        results = {part: before[part] for part in self.parts if part in before}
        for name in [] if arguments.tables else arguments.only or self.parts:
            rounds = arguments.rounds or self.parts[name].rounds
            torch.set_num_threads(self.parts[name].threads)
            started = time.monotonic()
            measured = self.parts[name].measure(rounds)
            command = f"python -m benchmarks.{self.name}" + (f" --only {name}" if len(self.parts) > 1 else "")
            about = settings(command=command, rounds=rounds, seconds=round(time.monotonic() - started))
            results[name] = {"about": about, "measured": measured}
            write_json(file, results)
            print(f"\n{self.text(name, results[name])}", flush=True)
        page.write_text(self.in_page(page.read_text(encoding="utf-8"), results), encoding="utf-8")


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict[str, float]:
    """Return the median seconds of each candidate. A round runs each of them once, so that noise affects all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    try:
        for turn in range(warm_up + rounds):
            for name, candidate in candidates.items():
                started = time.perf_counter()
                candidate()
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                if turn >= warm_up:
                    seconds[name].append(time.perf_counter() - started)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in seconds.items()}


def settings(**more: Any) -> dict[str, Any]:
    """Return machine, threads, allocator, versions and commit."""
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "MKL_", "KMP_", "GOMP_", "MALLOC_", "LD_PRELOAD"))
        },
        "commit": commit(),
        "versions": versions(),
        **more,
    }


def output_of(command: list[str]) -> str:
    """Return the output of a command; empty if it is not installed."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
