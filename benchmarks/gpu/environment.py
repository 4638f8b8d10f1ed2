"""Step `environment`: what is installed and imports, and whether the grouped product runs without its fallback."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from benchmarks.gpu.run import Run, draw, waits
from nlgmoe.layers.experts import Experts

PACKAGES = (
    *("lightning", "deepspeed", "torchmetrics", "jsonargparse", "tokenizers", "safetensors", "transformers"),
    *("datasets", "pytest"),
)


def environment(run: Run, folder: Path) -> None:
    """Import everything once; the steps after it are told what is missing."""
    missing = {}
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except Exception as error:  # what is installed may still not import: no compiler, another CUDA
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    run.results.runs[-1]["missing"] = missing
    run.note("packages missing", missing)
    run.note("compute capability", None if run.dry else list(torch.cuda.get_device_capability(run.device)))
    run.aim("waits of experts in bf16", waits_of_experts(run, torch.bfloat16), at_most=0)
    for dtype in (torch.float16, torch.float32):
        run.note(f"waits of experts in {str(dtype).removeprefix('torch.')}", waits_of_experts(run, dtype))


def waits_of_experts(run: Run, dtype: torch.dtype) -> int | None:
    """Whether experts wait, forward or backward: PyTorch's fallback of the grouped product sends the offsets to the host."""
    experts = Experts(16, 64, 256).to(run.device, dtype)
    draw(experts)
    x = torch.randn(256, 64, device=run.device, dtype=dtype, requires_grad=True)
    rows = torch.full((16,), 12, device=run.device)
    experts(x, rows).sum().backward()  # the first time, libraries set themselves up
    return waits(run.device, lambda: experts(x, rows).sum().backward())
