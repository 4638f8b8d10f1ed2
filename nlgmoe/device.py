"""What differs between a CPU and an accelerator: the one file that asks which of them a device is.

Everything else runs the same lines on both. `torch.accelerator` names the kind, so that no kind is named here; Lightning's names
for one kind are.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Of cgroups, version 2 and 1.
_CONTAINER_LIMITS = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]


def default_device() -> str:
    """The accelerator of this machine if it has one, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def is_accelerator(device: torch.device) -> bool:
    """True if tensors of the host have to be copied to `device`."""
    return device.type != "cpu"


def lacks_gpu(accelerator: Any) -> bool:
    """Whether `trainer.accelerator` asks for a GPU where there is none."""
    return accelerator in ("gpu", "cuda") and not torch.accelerator.is_available()


def missing_compiler(device: torch.device) -> str | None:
    """What `torch.compile` would not find on this machine to compile for `device`, in words; None: nothing is missing.

    Where it looks: PyTorch for a CPU, Triton for an accelerator.
    """
    language, variable, names = ("C", "CC", ["gcc", "clang"]) if is_accelerator(device) else ("C++", "CXX", ["g++"])
    names = [os.environ[variable]] if os.environ.get(variable) else names
    return (
        None
        if any(map(shutil.which, names))
        else f"a {language} compiler ({' or '.join(names)}; {variable} names another)"
    )


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restore the global generators of the CPU and of `device` when the context ends."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host; an accelerator does not make the host wait for it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A queue of its own, in which a wait does not wait for the computation; on a CPU there is one queue."""
    return nullcontext() if device.type == "cpu" else torch.Stream(device)


def time_stamp(device: torch.device) -> float | torch.Event:
    """Now, in seconds; of an accelerator, an event that is reached when all that was asked of it before is done."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def peak_memory(device: torch.device) -> list[int]:
    """Most bytes held so far by tensors and by PyTorch's allocator; empty for a CPU, whose memory is the process's."""
    if device.type == "cpu":
        return []
    module: Any = torch.get_device_module(device)
    return [module.max_memory_allocated(device), module.max_memory_reserved(device)]


def total_memory(device: torch.device) -> int:
    """Bytes of an accelerator's memory; of a CPU, of the machine's, or of the container's limit if that is less."""
    if device.type == "cpu":
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
        for file in _CONTAINER_LIMITS:
            with suppress(OSError, ValueError):  # no such file; `max`
                found.append(int(file.read_text()))
        return min(found)
    module: Any = torch.get_device_module(device)
    return int(module.get_device_properties(device).total_memory)


def free_cached_memory(device: torch.device) -> bool:
    """Give the memory that PyTorch's allocator keeps back to the device. Returns whether there is such an allocator."""
    if device.type == "cpu":
        return False
    torch.get_device_module(device).empty_cache()
    return True


def product_name(device: torch.device) -> str | None:
    """What an accelerator calls itself; None for a CPU."""
    name: str | None = None if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return name
