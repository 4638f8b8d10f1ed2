"""The rows that are planned beside the strong baseline, and how far they are; `python -m benchmarks.gate --status`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.documents import markdown_table
from benchmarks.gate.candidate import read_candidate
from benchmarks.gate.records import Records
from benchmarks.gate.search import FACTORS, MORE, RATES, SEEDS
from benchmarks.gate.sides import BASELINES, Side
from benchmarks.gate.verdict import PLANNED_PAIRS, seeds_of, steps_of
from benchmarks.reproduce.scale import CPU
from benchmarks.runs import ROOT
from benchmarks.training import Run

SEARCH_RUNS = len(SEEDS) * (1 + len(FACTORS) + len(RATES) - 1 + MORE)  # at most
EXAMPLES, STRONG_FILE = ROOT / "docs/examples/gate", ROOT / "configs/gate/strong.yaml"
SECONDS, SILENT = (
    0.25,
    600,
)  # of a step, before the first run has ended; a run that logs nothing for so long has stopped


@dataclass(frozen=True)
class Entry:
    """A planned row.

    Attributes:
        candidate: its YAML file.
        baseline: what it is compared with.
    """

    candidate: Path
    baseline: str


CARRIED = ("hash_routing", "dense", "frozen_router", "experts_32_quarter_top4")
PLAN = (Entry(STRONG_FILE, "muon"), *(Entry(EXAMPLES / f"{name}.yaml", "strong") for name in CARRIED))


def status(records: Records, out: Path, jobs: int) -> str:
    """Return what is done, running and missing of the search and of the planned rows, and the hours that are left.

    Args:
        records: results.
        out: folder of the runs.
        jobs: runs at a time.
    """
    names = [record["name"] for record in records.runs.values()]
    searched, missing = sum(name.startswith("search-") for name in names), dict[str, int]()  # steps by side and seed
    rows: list[list[object]] = [["search", "muon", f"{searched} of at most {SEARCH_RUNS} runs", ""]]
    for entry in PLAN:
        base = BASELINES[entry.baseline]
        if not all(Path(file).exists() for file in (entry.candidate, base.files[-1]) if not str(file).startswith("{")):
            rows.append([entry.candidate.stem, base.name, "waits for the search", f"{PLANNED_PAIRS} pairs"])
            continue
        sides = read_candidate(str(entry.candidate), None, CPU, base), Side(base.name, CPU, base)
        measured = records.costs_of(sides[0], numerics="")
        lengths = [*steps_of(measured, CPU.steps).values()] if measured else [(CPU.steps, CPU.steps)]
        lacking = [seed for seed in seeds_of(PLANNED_PAIRS) if not records.pair(sides, seed, lengths)]
        missing |= {f"{side.name} {seed}": CPU.steps for seed in lacking for side in sides}
        done = f"{PLANNED_PAIRS - len(lacking)} of {PLANNED_PAIRS} pairs"
        rows.append([entry.candidate.stem, base.name, done, ", ".join(f"seed {seed}" for seed in lacking)])
    rates = [record["seconds"] / record["steps"] for record in records.runs.values() if record["scale"] == CPU.name]
    steps = sum(missing.values()) + CPU.steps * max(0, SEARCH_RUNS - searched) * (not STRONG_FILE.exists())
    hours = steps * (sum(rates) / len(rates) if rates else SECONDS) / jobs / 3600
    lines = [
        markdown_table(["row", "baseline", "done", "missing"], rows),
        f"about {hours:.1f} hours left, {jobs} runs at a time",
    ]
    for folder in sorted(out.glob("*/seed*")):
        file = folder / "metrics.csv"
        if file.exists() and not (folder / "summary.json").exists() and time.time() - file.stat().st_mtime < SILENT:
            run = Run(folder.name, folder, (), CPU.steps)
            lines.append(f"running: {folder.parent.name} {folder.name}, step {run.done:,}")
    return "\n".join(lines)
