"""The two sides of a comparison: a baseline, and a candidate that changes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.gate.verdict import PLANNED_PAIRS
from benchmarks.reproduce.scale import CONFIGS, CPU, CPU_2X, Scale, run_settings
from benchmarks.runs import ROOT
from nlgmoe.config import GPTConfig
from nlgmoe.experiment import parse_config


@dataclass(frozen=True)
class Baseline:
    """What candidates are compared with.

    Attributes:
        name: of rows and folders.
        files: of settings, or their text as JSON.
        scale: size of the runs.
        pairs: seeds of a row.
    """

    name: str
    files: tuple[str, ...]
    scale: Scale = CPU
    pairs: int = PLANNED_PAIRS


# The learning rate of the claims' MoE-16, which was interpolated between searched ones.
RATE = json.loads((ROOT / "docs/results/reproduce.json").read_text())["runs"]["moe_16@1-seed1"]["learning_rate"]
MOE_16 = tuple(str(ROOT / CONFIGS / f"{name}.yaml") for name in ("base", "moe_16"))
PAPER = Baseline("paper", (*MOE_16, json.dumps({"model": {"optimizer": {"lr": RATE}}})))
STRONG = Baseline("strong", (*MOE_16, str(ROOT / "configs/gate/strong.yaml")))
STRONG_2X = Baseline("strong_2x", (*STRONG.files, str(ROOT / "configs/gate/strong_2x.yaml")), CPU_2X, 4)
BASELINES = {baseline.name: baseline for baseline in (PAPER, STRONG, STRONG_2X)}


@dataclass(frozen=True)
class Side:
    """The candidate or the baseline.

    Attributes:
        name: of rows and folders.
        scale: size of the runs.
        base: the baseline.
        overlays: files of settings, or their text as JSON, over those of the baseline; none: the baseline itself.
        rate: learning rate; None: that of the files.
        home: folder of its runs.
    """

    name: str
    scale: Scale
    base: Baseline
    overlays: tuple[str, ...] = ()
    rate: float | None = None
    home: Path = Path()

    @property
    def fingerprint(self) -> str:
        """The hash in the folder's name."""
        return self.home.name.rpartition("-")[2]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings but those of the single run."""
        return parse_config([*self.base.files, *self.overlays])

    @cached_property
    def config(self) -> GPTConfig:
        """The model."""
        return GPTConfig.from_dict(self.settings["model"]["config"])

    @property
    def learning_rate(self) -> float:
        """The peak."""
        return self.rate or float(self.settings["model"]["optimizer"]["lr"])

    @cached_property
    def cooldown(self) -> float:
        """Its share of a run."""
        schedule = self.settings["model"]["schedule"]
        return float(schedule["cooldown_tokens"] / schedule["decay_tokens"])

    def files(self, steps: int, seed: int) -> list[str]:
        """Return the files of settings of a run, or their text."""
        own = run_settings(self.scale, ROOT, steps, seed, self.learning_rate, self.cooldown)
        own["trainer"]["logger"] = True  # curves for the report; the baseline's file turns them off
        return [*self.base.files, *self.overlays, json.dumps(own)]
