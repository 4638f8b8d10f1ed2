"""The rows that are planned beside the strong baseline, and how far they are; `python -m benchmarks.gate --status`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.documents import markdown_table
from benchmarks.gate.candidate import read_candidate
from benchmarks.gate.records import Records
from benchmarks.gate.sides import BASELINES, Side
from benchmarks.gate.verdict import seeds_of, steps_of
from benchmarks.reproduce.scale import CPU
from benchmarks.runs import ROOT
from benchmarks.training import Run

EXAMPLES = ROOT / "docs/examples/gate"
SECONDS = 0.25  # of a step, before the first run has ended
SILENT = 600  # seconds; a run that logs nothing for so long has stopped


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
PLAN = (
    *(
        Entry(EXAMPLES / f"{name}.yaml", "strong")
        for name in ("hash_routing", "dense", "strong/muon_alone", "frozen_router")
    ),
    *(Entry(EXAMPLES / f"strong/{name}.yaml", "strong") for name in ("experts_32_quarter_top4", "second_half")),
    *(Entry(EXAMPLES / f"{name}.yaml", "paper") for name in ("unit_weight", "hashed_probability")),
    *(
        Entry(EXAMPLES / f"{name}.yaml", "strong")
        for name in ("unit_weight", "quantile", "hashed_weights", "smooth_bias")
    ),
    *(Entry(EXAMPLES / f"{name}.yaml", "strong_2x") for name in ("dense", "hash_routing")),
)


def status(records: Records, out: Path, jobs: int) -> str:
    """Return what is done, running and missing of the planned rows, and the hours that are left.

    Args:
        records: results.
        out: folder of the runs.
        jobs: runs at a time.
    """
    runs = [run for run in records.runs.values() if run["scale"] == CPU.name]
    missing, rows = set[tuple[str, str, int]](), list[list[object]]()
    for entry in PLAN:
        base = BASELINES[entry.baseline]
        seeds = seeds_of(base.pairs)
        lacking = _lacking(entry, seeds, records)
        missing |= {(name, base.name, seed) for seed in lacking for name in (entry.candidate.stem, base.name)}
        done = f"{len(seeds) - len(lacking)} of {len(seeds)} pairs"
        rows.append([entry.candidate.stem, entry.baseline, done, ", ".join(f"seed {seed}" for seed in lacking)])
    a_step = sum(run["seconds"] / run["steps"] for run in runs) / len(runs) if runs else SECONDS
    hours = sum(BASELINES[base].scale.steps for _, base, _ in missing) * a_step / jobs / 3600
    lines = [markdown_table(["row", "baseline", "done", "missing"], rows)]
    lines.append(f"about {hours:.1f} hours left, {jobs} runs at a time")
    for folder in sorted(out.glob("*/seed*")):
        file = folder / "metrics.csv"
        if file.exists() and not (folder / "summary.json").exists() and time.time() - file.stat().st_mtime < SILENT:
            run = Run(folder.name, folder, (), CPU.steps)
            lines.append(f"running: {folder.parent.name} {folder.name}, step {run.done:,}")
    return "\n".join(lines)


def _lacking(entry: Entry, seeds: Sequence[int], records: Records) -> list[int]:
    """Return the seeds whose pairs are not stored."""
    base = BASELINES[entry.baseline]
    sides = read_candidate(str(entry.candidate), None, base.scale, base), Side(base.name, base.scale, base)
    measured = records.costs_of(sides[0], numerics="")
    lengths = [*steps_of(measured, base.scale.steps).values()] if measured else [(base.scale.steps, base.scale.steps)]
    return [seed for seed in seeds if not records.pair(sides, seed, lengths, today="")]
