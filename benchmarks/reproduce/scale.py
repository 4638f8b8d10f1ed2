"""The size of the runs of `configs/reproduce`, and their settings."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.reproduce.cells import BUDGETS, COOLDOWN, STEP_TOKENS, STEPS
from benchmarks.runs import processor

CONFIGS = Path("configs/reproduce")


@dataclass(frozen=True)
class Scale:
    """The size of the runs.

    Attributes:
        name: `cpu`, `cpu_2x` with twice the tokens, or `tiny` for a test.
        steps: optimizer steps of the whole budget.
        step_tokens: tokens of a step.
        settings: override those of the files, nested as in YAML.
    """

    name: str
    steps: int
    step_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def milestones(self) -> int:
        """Steps between the checkpoints that shorter runs start from."""
        return round(min(BUDGETS) * (1 - COOLDOWN) * self.steps)


CPU, CPU_2X = (Scale(name, factor * STEPS, STEP_TOKENS) for name, factor in (("cpu", 1), ("cpu_2x", 2)))
TINY = Scale(
    "tiny",
    20,
    2 * 16,
    {
        "model": {"config": {"seq_len": 16, "hidden_size": 16}},
        "data": {"micro_batch_size": 2, "max_eval_windows": 8},
    },
)


def run_settings(
    scale: Scale, tree: Path, steps: int, seed: int, rate: float, cooldown: float = COOLDOWN
) -> dict[str, Any]:
    """Return the settings of a run besides the files of configs/reproduce.

    Args:
        scale: size of the runs.
        tree: folder of the code, with its data.
        steps: optimizer steps; the last of them are the cooldown.
        seed: of weights and order.
        rate: learning rate.
        cooldown: share of the steps.
    """
    (checkpoint,) = yaml.safe_load((tree / CONFIGS / "base.yaml").read_text())["trainer"]["callbacks"]
    interval = "milestones" if "milestones" in checkpoint["init_args"] else "every_n_train_steps"  # before 0.4
    checkpoint["init_args"][interval] = scale.milestones
    tokens = steps * scale.step_tokens
    return {
        "model": {
            **scale.settings.get("model", {}),
            "seed": seed,
            "optimizer": {"lr": rate},
            "train_tokens": tokens,
            "schedule": {
                "warmup_tokens": scale.steps // 40 * scale.step_tokens,
                "decay_tokens": tokens,
                "cooldown_tokens": round(cooldown * steps) * scale.step_tokens,
            },
        },
        "data": {**scale.settings.get("data", {}), "seed": seed, "data_dir": str(tree / "data/pocket_pile")},
        "trainer": {**scale.settings.get("trainer", {}), "callbacks": [checkpoint]},
    }


def machine() -> str:
    """Return the processor, and what a run has of it."""
    return f"{processor()}, {os.cpu_count()} cores, one thread a run"
