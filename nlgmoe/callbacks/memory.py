"""Memory of a process and of its GPU."""

from __future__ import annotations

import resource
import sys

import torch

MEMORY = ("process_bytes", "gpu_bytes", "gpu_reserved_bytes")


def memory_bytes(device: torch.device) -> dict[str, int]:
    """The most held so far, by name of `MEMORY`: resident in the process; of a GPU, by tensors and by PyTorch's allocator."""
    values = [resident_bytes()]
    if device.type == "cuda":
        values += [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
    return dict(zip(MEMORY, values, strict=False))


def resident_bytes() -> int:
    """Most memory this process has had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory_bytes() -> int:
    """Most memory this process has held: of the GPU where there is one, resident otherwise."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_bytes()
