"""Settings of the memory allocators, made before a run begins: of the C library on CPUs, of PyTorch's on accelerators."""

from __future__ import annotations

import ctypes
import os

import torch

from nlgmoe.device import is_accelerator

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's mallopt(3)


def configure_allocator(device: torch.device) -> None:
    """Configure the allocator for a run on `device`, unless the environment configures it.

    On an accelerator the host's allocator is not changed, and PyTorch's allocator grows its segments instead of adding new ones:
    batches and rows of an expert have many sizes, which would fragment memory. PyTorch reads the setting at its first allocation.
    """
    if not is_accelerator(device):
        keep_compiled_kernels()
        keep_freed_memory()
    elif "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which PyTorch prefers
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def keep_compiled_kernels() -> None:
    """Make oneDNN keep 20,000 compiled kernels instead of 1,024, unless the environment sets their number.

    A product in bf16 has a kernel for each number of rows, and experts have other numbers of rows in every step: a step of a few
    layers would evict what the next one needs (docs/performance.md). oneDNN reads the number at the first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")


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
