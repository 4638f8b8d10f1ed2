"""Errors of ranks against one process, in the runs of `tests/support/cells.py`. 1 minute.

    python -m benchmarks.parity

For every cell: the largest relative error of the losses (20 steps, or what the cell has), of the gradient norms by which
DeepSpeed clips, and of any tensor of the first gradient (as a share of its norm, or of a thousandth of the global norm where
that is more). The table has the largest errors by number of ranks; the JSON file has all.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.timing import ROOT, Benchmark, Part, Table

sys.path.append(str(ROOT / "docs/examples"))  # as for pytest: a cell has the router of an example

from tests.support.cells import CELLS, HALF
from tests.support.ranks import Cell, Outcome, alone, train_all
from tests.support.spawn import spawn

KINDS = ("losses", "clip_norms", "gradients")


def errors(expected: Outcome, ranks: list[Outcome]) -> dict[str, float | None]:
    """Return the three errors of a cell; None for clip norms where it has none."""
    norms = [sum(squares.values()) ** 0.5 for squares in expected.squares]
    gradients = {name: value for outcome in ranks for name, value in outcome.gradients.items()}
    floor = 1e-3 * torch.stack([value.norm() for value in expected.gradients.values()]).norm()
    return {
        "losses": max(_relative(outcome.losses, expected.losses) for outcome in ranks),
        "clip_norms": max((_relative(o.clip_norms, norms) for o in ranks if o.clip_norms), default=None),
        "gradients": max(
            float((gradients[name] - value).norm() / max(value.norm(), floor))
            for name, value in expected.gradients.items()
        ),
    }


def _relative(found: list[float], expected: list[float]) -> float:
    return max(abs(ours - other) / abs(other) for ours, other in zip(found, expected, strict=True))


def measure(_: int) -> dict[str, dict[str, Any]]:
    """Return the errors by cell."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    measured: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        for ranks, cells in CELLS.items():
            cells = [replace(cell, steps=20) if cell.steps == Cell.steps else cell for cell in cells]
            cells += HALF if ranks == 2 else []
            found = spawn(ranks, train_all, cells, ranks, folder, folder=folder / str(ranks))
            for index, cell in enumerate(cells):
                expected = alone(replace(cell, precision="32-true"), ranks, folder)
                row = {"ranks": ranks, "steps": cell.steps, "precision": cell.precision}
                measured[cell.name] = row | errors(expected, [rank[index] for rank in found])
    return measured


def table(measured: dict[str, dict[str, Any]]) -> Table:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in measured.values():
        groups.setdefault((row["ranks"], row["precision"]), []).append(row)
    rows: list[Any] = []
    for group, cells in groups.items():
        worst = [max((cell[kind] for cell in cells if cell[kind] is not None), default=None) for kind in KINDS]
        rows.append([*group, len(cells), *(None if value is None else f"{value:.1e}" for value in worst)])
    return ["ranks", "precision", "cells", "losses", "clip norms", "first gradient"], rows


BENCHMARK = Benchmark("parity", "scaling.md", {"parity": Part(measure, table, threads=1)})

if __name__ == "__main__":
    BENCHMARK.run(__doc__)
