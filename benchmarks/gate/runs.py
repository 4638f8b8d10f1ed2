"""The runs of both sides: their folders, and the runs of a seed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from typing_extensions import override

from benchmarks.gate.records import Record, Records, described
from benchmarks.gate.sides import Side
from benchmarks.training import Launcher, Run, train
from nlgmoe import load_model
from nlgmoe.seeding import key_of_draws


@dataclass(frozen=True)
class StoredRun(Run):
    """A run whose result is stored as it ends.

    Attributes:
        records: where.
        about: the rest of its record.
        again: its checkpoints are needed, so that it is trained although its result is stored.
    """

    records: Records = field(kw_only=True)
    about: Record = field(kw_only=True)
    again: bool = False

    @property
    @override
    def has_ended(self) -> bool:
        """See `Run`."""
        return super().has_ended or (self.name in self.records.runs and not self.again)

    @property
    @override
    def loss(self) -> float:
        """See `Run`."""
        return float(self.records.runs[self.name]["val_loss"]) if self.name in self.records.runs else super().loss

    @override
    def train(self, launch: Launcher) -> str:
        """See `Run`."""
        words = super().train(launch)
        self.store()
        return words

    def store(self) -> None:
        """Store the result of a run that has ended, if it is not."""
        if self.name not in self.records.runs and super().has_ended:
            summary = self.summary
            result = {"val_loss": super().loss, "bits_per_byte": summary["bits_per_byte"]["all"]}
            self.records.add(self.name, {**result, **self.about, "seconds": round(summary["wall_seconds"])})


def fingerprint(side: Side, out: Path, launch: Launcher) -> str:
    """Return a hash of the weights after three training steps: of code, torch, machine and text; and of the overlays."""
    few = json.dumps({"trainer": {"max_steps": 3, "logger": False}, "data": {"max_eval_windows": 1}})
    folder = out / f"{side.name}-first-steps"
    shutil.rmtree(folder, ignore_errors=True)
    Run(folder.name, folder, (*side.files(side.scale.steps, 1), few), 3).train(launch)
    digest = hashlib.sha256("".join(side.overlays).encode())
    weights = load_model(folder / "checkpoints/last.ckpt").state_dict()
    for name, value in sorted((key_of_draws(name), value) for name, value in weights.items()):
        digest.update(name.encode() + value.numpy().tobytes())
    shutil.rmtree(folder)
    return digest.hexdigest()[:12]


def placed(side: Side, out: Path, launch: Launcher) -> Side:
    """Return the side with the folder of its runs below `out`: another one if its code or settings have changed."""
    return replace(side, home=out / f"{side.name}-{fingerprint(side, out, launch)}")


def run_of(side: Side, seed: int, steps: int, records: Records, numerics: str, start: int = 0) -> StoredRun:
    """Return a run of a side; it begins from its whole run of that seed at step `start`, or from random weights."""
    whole = steps == side.scale.steps
    folder = side.home / (f"seed{seed}" + ("" if whole else f"-{steps}"))
    trunk = side.home / f"seed{seed}/checkpoints/step-{start}.ckpt" if start else None
    keep = whole and not side.overlays  # shorter runs of later gates begin from the baseline's whole ones
    about = {"seed": seed, "steps": steps, **described(side), "numerics": numerics}
    files, name = tuple(side.files(steps, seed)), f"{side.home.name} {folder.name}"
    run = StoredRun(name, folder, files, steps, trunk, start, keep, records=records, about=about)
    run.store()
    return run


def series(side: Side, seed: int, lengths: Iterable[int], records: Records, numerics: str) -> dict[int, StoredRun]:
    """Return the whole run of a seed, and shorter ones from its constant part, by steps; in the order of training."""
    whole, every = side.scale.steps, side.scale.milestones
    starts = {n: (n - round(side.cooldown * n)) // every * every for n in sorted({*lengths} - {whole}, reverse=True)}
    first = run_of(side, seed, whole, records, numerics)
    shorter = {steps: run_of(side, seed, steps, records, numerics, start) for steps, start in starts.items()}
    again = any(run.trunk and not run.trunk.exists() and not run.has_ended for run in shorter.values())
    return {whole: replace(first, again=again)} | shorter


def trained_pairs(
    sides: tuple[Side, Side],
    seeds: Sequence[int],
    lengths: Sequence[tuple[int, int]],
    records: Records,
    numerics: str,
    jobs: int,
    launch: Launcher,
) -> dict[int, list[dict[int, float]]]:
    """Train the pairs that are not stored, and return the losses of candidate and baseline, by steps, of each seed.

    Args:
        sides: candidate and baseline, with their folders.
        seeds: of the pairs.
        lengths: steps of candidate and baseline.
        records: results that are there, and those to come.
        numerics: of this code and machine.
        jobs: runs at a time, one thread each.
        launch: starts a command.
    """  # fmt: skip
    missing = [seed for seed in seeds if not records.pair(sides, seed, lengths, numerics)]
    of_sides = [*zip(sides, zip(*lengths, strict=True), strict=True)]
    train(
        [[*series(side, seed, of, records, numerics).values()] for seed in missing for side, of in of_sides],
        jobs,
        launch,
    )
    return {seed: records.pair(sides, seed, lengths, numerics) for seed in seeds}
