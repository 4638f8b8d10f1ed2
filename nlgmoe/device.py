"""Differences between a CPU and an accelerator, and the memory of both.

`torch.accelerator` names the type of the accelerator, so that no accelerator is named here.
"""

import os
import resource
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def default_device() -> str:
    """Return the type of this machine's accelerator, or `cpu` if it has none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def name_deepspeeds_device() -> None:
    """Name the device for DeepSpeed on a machine without accelerator, before its import: its search logs to standard output."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def is_accelerator(device: torch.device) -> bool:
    """Return True if host tensors must be copied to `device`."""
    return device.type != "cpu"


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restore the global generators of the CPU and of `device` at the end of the context."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`, asynchronously if that is an accelerator."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def product_name(device: torch.device) -> str | None:
    """Return an accelerator's product name; None for a CPU."""
    name: str | None = None if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return name


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Return peak bytes: resident in the process, and on a GPU of tensors and of PyTorch's allocator."""
    memory = {"process_bytes": resident_bytes()}
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        memory["gpu_bytes"] = module.max_memory_allocated(device)
        memory["gpu_reserved_bytes"] = module.max_memory_reserved(device)
    return memory


def resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory() -> int | None:
    """Return the bytes of memory that this machine can give to processes now; None where the system does not say it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of the GPU that this process uses; without a GPU, of the process."""
    memory = memory_bytes(device)
    return memory.get("gpu_bytes", memory["process_bytes"])
