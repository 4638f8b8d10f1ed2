"""How far ranks are from one process: the cells of `tests/distributed/test_ranks.py` with their measured errors.

    python -m benchmarks.parity        (about 4 minutes on 2 cores)

For every cell: the largest relative error of the losses (20 steps, or what the cell has), of the gradient norms by which
DeepSpeed clips, and of any tensor of the first gradient (as a share of its norm, or of a thousandth of the global norm
where that is more).
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from nlgmoe.versions import versions
from tests.distributed.cells import Cell, Outcome, alone, on_ranks, run_all, spawn
from tests.distributed.test_ranks import CELLS, HALF

ROOT = Path(__file__).parents[1]


def errors(expected: Outcome, ranks: list[Outcome]) -> dict[str, float]:
    """The three errors of a cell."""
    norms = [sum(squares.values()) ** 0.5 for squares in expected.squares]
    gradients = {name: value for outcome in ranks for name, value in outcome.gradients.items()}
    total = torch.stack([value.norm() for value in expected.gradients.values()]).norm()
    return {
        "losses": max(_relative(outcome.losses, expected.losses) for outcome in ranks),
        "clip_norms": max((_relative(o.clip_norms, norms) for o in ranks if o.clip_norms), default=float("nan")),
        "gradients": max(
            float((gradients[name] - value).norm() / max(value.norm(), 1e-3 * total))
            for name, value in expected.gradients.items()
        ),
    }


def _relative(found: list[float], expected: list[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    table: dict[str, dict[str, float | int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks, cells in CELLS.items():
            chosen = [
                replace(cell, steps=20) if cell.steps == Cell.steps else cell
                for cell in cells + (HALF if ranks == 2 else [])
            ]
            found = spawn(
                ranks,
                run_all,
                [(on_ranks, cell) for cell in chosen],
                ranks,
                Path(folder),
                folder=Path(folder, str(ranks)),
            )
            for index, cell in enumerate(chosen):
                reference = replace(cell, precision="32-true")
                expected = alone(reference, ranks, Path(folder))
                table[cell.name] = {"ranks": ranks, "steps": cell.steps} | errors(
                    expected, [rank[index] for rank in found]
                )
    (ROOT / "docs/results/parity.json").write_text(
        json.dumps({"cells": table, "versions": versions()}, indent=1) + "\n"
    )
    print("| cell | ranks | losses | clip norms | first gradient |\n|---|---|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | {row['ranks']} | {row['losses']:.1e} | {row['clip_norms']:.1e} | {row['gradients']:.1e} |")


if __name__ == "__main__":
    main()
