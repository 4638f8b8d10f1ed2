"""Results of single runs, and measured costs: docs/results/gate_runs.json, in the form of reproduce.json.

A run is stored as it ends, so that a campaign may be stopped, moved to another machine, and continued there. `numerics` is a
hash of the baseline's weights after three steps, of code, PyTorch, processor and text. The losses of a pair are those of one
`numerics`: if the processor differs, both runs of a pair are trained again.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks.gate.sides import Side
from benchmarks.runs import ROOT, commit, processor
from nlgmoe.files import write_json

RUNS = ROOT / "docs/results/gate_runs.json"
Record = dict[str, Any]


class Records:
    """The runs and costs of a file.

    Args:
        file: JSON.
        commits: each result is committed to the file's repository as its run ends.
    """

    def __init__(self, file: Path, commits: bool = False) -> None:
        self.file, self.commits, self._lock = file, commits, Lock()
        self._origin = {"commit": commit(), "processor": processor()}
        content = json.loads(file.read_text()) if file.exists() else {}
        self.runs: dict[str, Record] = content.get("runs", {})
        self.costs: dict[str, Any] = content.get("costs", {})

    def add(self, name: str, record: Record) -> None:
        """Store a run, with the commit and the processor of this process."""
        with self._lock:
            self.runs[name] = record | self._origin
            self._write(f"gate: {name}, validation loss {record['val_loss']:.4f}")

    def costs_of(self, side: Side, numerics: str) -> dict[str, Any]:
        """Return the stored costs of a candidate, also another processor's, so that shorter runs are the same; else none."""
        own = self.costs.get(side.home.name)
        others = [costs for costs in self.costs.values() if costs["numerics"] != numerics]
        return own or next((costs for costs in others if described(side).items() <= costs.items()), {})

    def add_costs(self, side: Side, numerics: str, costs: dict[str, Any]) -> None:
        """Store the costs of a candidate as multiples of its baseline's."""
        with self._lock:
            self.costs[side.home.name] = {**described(side), "numerics": numerics, **costs}
            self._write(f"gate: costs of {side.home.name}")

    def pair(
        self, sides: Sequence[Side], seed: int, lengths: Iterable[tuple[int, int]], today: str
    ) -> list[dict[int, float]]:
        """Return the losses of both sides by steps, from runs of the same numerics; empty if none has all.

        Args:
            sides: candidate and baseline, with their folders.
            seed: of both.
            lengths: steps of candidate and baseline.
            today: numerics of this code and machine, under which a class's code has to be today's too.
        """
        needed = [{*steps} for steps in zip(*lengths, strict=True)]
        for numerics in dict.fromkeys(record["numerics"] for record in reversed(self.runs.values())):
            losses = [self._losses(side, seed, numerics, today) for side in sides]
            if all(steps <= of.keys() for steps, of in zip(needed, losses, strict=True)):
                return losses
        return []

    def _losses(self, side: Side, seed: int, numerics: str, today: str) -> dict[int, float]:
        wanted = {"seed": seed, "numerics": numerics, **described(side)}
        return {
            record["steps"]: record["val_loss"]
            for name, record in self.runs.items()
            if wanted.items() <= record.items() and (numerics != today or name.startswith(side.home.name))
        }

    def _write(self, message: str) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"costs": self.costs, "runs": self.runs})
        if self.commits:
            for words in (["add", self.file.name], ["commit", "--quiet", f"--message={message}", self.file.name]):
                # A repository that another command has locked gets the file with the next result.
                subprocess.run(["git", *words], cwd=self.file.parent, check=False)


def described(side: Side) -> Record:
    """Return what tells a side's runs from those of others."""
    overlays = [json.loads(overlay) for overlay in side.overlays]
    rate = side.learning_rate
    about = {"name": side.name, "baseline": side.base.name, "overlays": overlays}
    return {**about, "learning_rate": rate, "scale": side.scale.name}
