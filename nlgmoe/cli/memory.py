"""How the C library deals with memory that a training step gives back and the next one wants again."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's mallopt(3)


def keep_freed_memory() -> bool:
    """Keep it, whatever its size, in place of handing large blocks back to the kernel; whether that could be said.

    Activations, logits and gradients of one step are as large as those of the next. By default glibc unmaps each of them, and the
    kernel then clears it page by page when it is asked for again: a third of a step on CPUs (docs/performance.md). Nothing is
    changed where the environment has settings of its own (`MALLOC_...`, another allocator), or where there is no glibc.
    """
    if "LD_PRELOAD" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 2**20}
    accepted = [mallopt(name, value) == 1 for name, value in settings.items()]
    return all(accepted)
