"""Differences between a CPU and an accelerator.

`torch.accelerator` names the type of the accelerator, so that no accelerator is named here.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
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


def missing_compiler(device: torch.device) -> str | None:
    """Describe the compiler that `torch.compile` needs for `device` and this machine lacks; None if it has one.

    PyTorch compiles for a CPU, Triton for an accelerator.
    """
    language, variable, names = ("C", "CC", ["gcc", "clang"]) if is_accelerator(device) else ("C++", "CXX", ["g++"])
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if any(map(shutil.which, names)):
        return None
    return f"a {language} compiler ({' or '.join(names)}; {variable} names another)"


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restore the global generators of the CPU and of `device` at the end of the context."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`, asynchronously if that is an accelerator."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context with a new stream, in which waiting does not wait for the computation; on a CPU, a null context."""
    return nullcontext() if device.type == "cpu" else torch.Stream(device)


def time_stamp(device: torch.device) -> float | torch.Event:
    """Return the time in seconds; on an accelerator, record an event after the work submitted so far."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def peak_memory(device: torch.device) -> list[int]:
    """Return the peak bytes allocated by tensors and reserved by PyTorch's allocator; empty for a CPU, which counts neither."""
    if device.type == "cpu":
        return []
    module: Any = torch.get_device_module(device)
    return [module.max_memory_allocated(device), module.max_memory_reserved(device)]


def free_cached_memory(device: torch.device) -> bool:
    """Free the memory that PyTorch's allocator caches. Returns False for a CPU, whose allocator caches none."""
    if device.type == "cpu":
        return False
    torch.get_device_module(device).empty_cache()
    return True


def product_name(device: torch.device) -> str | None:
    """Return an accelerator's product name; None for a CPU."""
    name: str | None = None if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return name
