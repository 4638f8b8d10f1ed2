"""Train short runs with the campaign's code and with today's, and compare their losses.

The runs are in float64, with a tenth of the learning rate. In float32 at the campaign's rates equal code would end apart: during
the warm-up of `dense` a difference in the last bits grows by ten orders of magnitude in twelve steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.documents import markdown_table
from benchmarks.reproduce.campaign import Campaign, Scale
from benchmarks.reproduce.cells import STEP_TOKENS, TEACHER, TUNED, Cell
from nlgmoe.files import write_json

RUNS = [(Cell("dense"), 1), (Cell("moe_16"), 1), (TEACHER, 1)]
RATE = 1e-3
SHORT = Scale("short", 240, STEP_TOKENS, {"trainer": {"precision": "64-true"}})


def train_again(trees: dict[str, Path], out: Path, file: Path, jobs: int) -> str:
    """Train `RUNS` with the code of two commits, write their losses to `file`, and return a table.

    Args:
        trees: folder of the code by commit; the older one first.
        out: folder of the runs.
        file: JSON file of the losses.
        jobs: runs at a time, one thread each.
    """
    losses: dict[str, dict[str, Any]] = {}
    for commit, tree in trees.items():
        campaign = Campaign(out / commit, out / f"{commit}.json", commit, tree, SHORT)
        campaign.results["learning_rates"] = dict.fromkeys(TUNED, RATE)
        campaign.train(RUNS, jobs)
        losses[commit] = {key: run["val_loss"] for key, run in campaign.results["runs"].items()}
    write_json(file, losses)
    (first, before), (second, after) = losses.items()
    rows = [[key, f"{before[key]:.7f}", f"{after[key]:.7f}", f"{after[key] - before[key]:+.1e}"] for key in before]
    return markdown_table(["", first[:7], second[:7], "difference"], rows)
