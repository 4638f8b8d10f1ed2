"""Memory of a process and of its GPU."""

from __future__ import annotations

import resource
import sys

import torch

from nlgmoe.device import peak_memory

MEMORY = ("process_bytes", "gpu_bytes", "gpu_reserved_bytes")


def memory_bytes(device: torch.device) -> dict[str, int]:
    """The most held so far, by name of `MEMORY`: resident in the process; of a GPU, by tensors and by PyTorch's allocator."""
    return dict(zip(MEMORY, [resident_bytes(), *peak_memory(device)], strict=False))


def resident_bytes() -> int:
    """Most memory this process has had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: of the GPU that it computes on, resident otherwise."""
    return next(iter(peak_memory(device)), resident_bytes())
