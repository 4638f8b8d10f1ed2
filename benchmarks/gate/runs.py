"""The runs of both sides: their folders, and the runs of a seed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks.gate.candidate import Side
from benchmarks.reproduce.cells import COOLDOWN
from benchmarks.training import Launcher, Run
from nlgmoe import load_model


def fingerprint(side: Side, out: Path, launch: Launcher) -> str:
    """Return a hash of the weights after three training steps: of code, torch, machine and text; and of the overlays."""
    few = json.dumps({"trainer": {"max_steps": 3, "logger": False}, "data": {"max_eval_windows": 1}})
    folder = out / f"{side.name}-first-steps"
    shutil.rmtree(folder, ignore_errors=True)
    Run(folder.name, folder, (*side.files(side.scale.steps, 1), few), 3).train(launch)
    digest = hashlib.sha256("".join(side.overlays).encode())
    for name, value in sorted(load_model(folder / "checkpoints/last.ckpt").state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    shutil.rmtree(folder)
    return digest.hexdigest()[:12]


def placed(side: Side, out: Path, launch: Launcher) -> Side:
    """Return the side with the folder of its runs below `out`: another one if its code or settings have changed."""
    return replace(side, home=out / f"{side.name}-{fingerprint(side, out, launch)}")


def run_of(side: Side, seed: int, steps: int, start: int = 0) -> Run:
    """Return a run of a side; it begins from its whole run of that seed at step `start`, or from random weights."""
    whole = steps == side.scale.steps
    folder = side.home / (f"seed{seed}" + ("" if whole else f"-{steps}"))
    trunk = side.home / f"seed{seed}/checkpoints/step-{start}.ckpt" if start else None
    keep = whole and not side.overlays  # shorter runs of later gates begin from the baseline's whole ones
    return Run(f"{side.name} {folder.name}", folder, tuple(side.files(steps, seed)), steps, trunk, start, keep)


def series(side: Side, seed: int, lengths: Iterable[int]) -> dict[int, Run]:
    """Return the whole run of a seed, and shorter ones from its constant part, by steps; in the order of training."""
    whole, every = side.scale.steps, side.scale.milestones
    starts = {steps: (steps - round(COOLDOWN * steps)) // every * every for steps in {*lengths} - {whole}}
    return {whole: run_of(side, seed, whole)} | {
        steps: run_of(side, seed, steps, starts[steps]) for steps in sorted(starts, reverse=True)
    }
