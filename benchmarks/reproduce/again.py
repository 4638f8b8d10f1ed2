"""Train models of the campaign again with the code of HEAD, and compare their losses.

Rounding alone moves the loss of a long run. So each model is trained twice: as it is, and with an `eps` of AdamW that differs by
1e-4 of its value, which changes the last bits of updates. A difference of that size is not one between commits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.documents import markdown_table
from benchmarks.reproduce.campaign import CPU, Campaign
from benchmarks.reproduce.cells import TEACHER, Cell
from nlgmoe.files import write_json

RUNS = [(Cell("dense"), 1), (Cell("moe_16"), 1), (TEACHER, 1)]
EPS = {"as it is": 1e-8, "eps * 1.0001": 1.0001e-8}


def train_again(before: dict[str, Any], commit: str, tree: Path, out: Path, file: Path, jobs: int) -> str:
    """Train `RUNS` with each of `EPS`, write their losses to `file`, and return a table.

    Args:
        before: the campaign's results: its losses, and the learning rates that are used again.
        commit: of the code in `tree`.
        tree: the code that trains.
        out: folder of the runs.
        file: JSON file of the losses.
        jobs: runs at a time, one thread each.
    """
    again: dict[str, Any] = {"commit": commit, "before": before["commit"], "losses": {}}
    for name, eps in EPS.items():
        folder = out / f"eps-{eps:g}"
        scale = replace(CPU, settings={"model": {"optimizer": {"eps": eps}}})
        campaign = Campaign(folder, folder / "results.json", commit, tree, scale)
        campaign.results["learning_rates"] = before["learning_rates"]
        campaign.train(RUNS, jobs)
        again["losses"][name] = {key: run["val_loss"] for key, run in campaign.results["runs"].items()}
        write_json(file, again)
    return table(before, again)


def table(before: dict[str, Any], again: dict[str, Any]) -> str:
    """Return a Markdown table of the losses of both commits, and of their differences."""
    as_is, changed = EPS
    head = ["", before["commit"][:7], again["commit"][:7], "difference", f"with {changed}", "difference"]
    rows = []
    for key, loss in again["losses"][as_is].items():
        first, other = before["runs"][key]["val_loss"], again["losses"][changed][key]
        rows.append(
            [key, f"{first:.4f}", f"{loss:.4f}", f"{loss - first:+.4f}", f"{other:.4f}", f"{other - loss:+.4f}"]
        )
    return markdown_table(head, rows)
