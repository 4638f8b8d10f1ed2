"""Peak memory of a process and of its GPU."""

from __future__ import annotations

import resource
import sys

import torch

from nlgmoe.device import peak_memory

MEMORY = ("process_bytes", "gpu_bytes", "gpu_reserved_bytes")


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Return peak bytes by name of `MEMORY`: resident in the process, and on a GPU of tensors and of PyTorch's allocator."""
    return dict(zip(MEMORY, [resident_bytes(), *peak_memory(device)], strict=False))


def resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of the GPU that this process uses; without a GPU, of the process."""
    return next(iter(peak_memory(device)), resident_bytes())
