"""Settings of the process that make training fast, unless its environment has them: threads and allocators.

`train.py`, the `nlgmoe` command and `load_config` call `prepare_process`, their trainer calls `prepare_allocator`: a notebook
trains as fast as the command, if it calls `prepare_process` before it imports torch. `import nlgmoe` changes nothing.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's mallopt(3)


def prepare_process() -> None:
    """Let waiting threads of OpenMP spin briefly; and Jupyter without ipywidgets show progress bars as text, without a warning.

    Call it before torch is imported, which reads the setting. By default, waiting libgomp threads spin: a step takes three times
    as long beside a busy process, and spinning slows the other hyperthread of the core (docs/results/performance.md).
    """
    warnings.filterwarnings("ignore", message="IProgress not found")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def prepare_allocator(device: torch.device) -> None:
    """Configure the allocator of a run on `device`.

    On an accelerator the host's allocator is not changed, and PyTorch's allocator grows its segments instead of adding new ones:
    batches and rows of an expert have many sizes, which would fragment memory. PyTorch reads the setting at its first allocation.
    """
    if device.type == "cpu":
        keep_freed_memory()
    elif "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which PyTorch prefers
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks of any size. Returns whether `mallopt` accepted it.

    Activations, logits and gradients of one step are as large as those of the next. By default glibc unmaps each of them, and the
    kernel then clears it page by page when it is allocated again: a third of a step on CPUs (docs/performance.md). Nothing is
    changed if the environment has settings of its own (`MALLOC_...`, another allocator), or there is no glibc.
    """
    if "LD_PRELOAD" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 2**20}
    accepted = [mallopt(name, value) == 1 for name, value in settings.items()]
    return all(accepted)
