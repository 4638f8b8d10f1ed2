"""Time a training step of every model, in turn in one process: the runs themselves share the machine with others."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.reproduce.campaign import Campaign
from benchmarks.reproduce.questions import QUESTIONS, runs_of
from benchmarks.step import gpt_step
from benchmarks.timing import interleaved, settings
from nlgmoe.model.gpt import GPT
from nlgmoe.process import keep_freed_memory


def measure(campaign: Campaign, rounds: int = 20) -> dict[str, Any]:
    """Return the median seconds of a step by configuration, and what they depend on; one thread, as the runs have."""
    torch.set_num_threads(1)
    keep_freed_memory()
    names = sorted({cell.config for cell, _ in runs_of(QUESTIONS)})
    seconds = interleaved({name: gpt_step(GPT(campaign.shape(name)), half=False) for name in names}, rounds)
    return {"step_seconds": seconds, **settings(rounds=rounds)}
