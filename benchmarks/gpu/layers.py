"""Step `layers`: a MoE layer, forward and backward in bf16, beside DeepSpeed's and a dense FFN of the same FLOPs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchmarks.gpu.run import Run, draw
from benchmarks.layer import deepspeed, half, ours, training
from benchmarks.timing import interleaved
from nlgmoe.config import GPTConfig
from nlgmoe.layers.feed_forward import FeedForward

SHAPES = ((8192, 1024, 16), (8192, 1024, 128), (16_384, 2048, 16))  # tokens, hidden size, experts
ENOUGH = 512  # rows an expert from which the layer is held against the dense one


def layers(run: Run, folder: Path) -> None:
    """Time them in turn."""
    for tokens, hidden, experts in ((64, 32, 4),) if run.dry else SHAPES:
        with run.device:
            candidates: dict[str, nn.Module] = {
                "dense": FeedForward(GPTConfig(8, 8, 1, hidden, 1), 4 * hidden),
                "nlgmoe": ours(hidden, experts, 1, dropping=True),
                "nlgmoe, dropless": ours(hidden, experts, 1, dropping=False),
                "DeepSpeed": deepspeed(hidden, experts, 1, dropping=True),
            }
        for layer in candidates.values():
            draw(layer)
        x = torch.randn(1, tokens, hidden, device=run.device, dtype=torch.bfloat16)
        gradient = torch.randn_like(x)
        runs = {name: training(half(layer, x.dtype), x, gradient) for name, layer in candidates.items()}
        seconds = interleaved(runs, rounds=1 if run.dry else 8)
        shape = f"{tokens} x {hidden}, {experts} experts"
        run.note(f"ms, {shape}", {name: 1e3 * value for name, value in seconds.items()})
        run.aim(f"nlgmoe over DeepSpeed, {shape}", seconds["nlgmoe"] / seconds["DeepSpeed"], at_most=1.0)
        limit = 1.6 if tokens >= ENOUGH * experts else None
        for name in ("nlgmoe", "nlgmoe, dropless"):
            run.aim(f"{name} over dense, {shape}", seconds[name] / seconds["dense"], at_most=limit)
