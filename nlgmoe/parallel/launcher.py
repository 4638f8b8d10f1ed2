"""A rank that Lightning has started ends with the process that started it, until all ranks are connected.

Before that, the rank would wait for the others for as long as a collective may take, half an hour. After that, it finds its
connections closed, and ends with an error line.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LAUNCHER = "NLGMOE_LAUNCHER"  # environment variable: the process that starts ranks
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2  # of Linux: the signal that a process gets when its parent ends


@contextmanager
def named_launcher() -> Iterator[None]:
    """Tell the ranks that are started in the block which process has started them."""
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(_LAUNCHER, None)


def end_with_launcher() -> None:
    """End this process when the one that started it ends, or now if it has ended; `outlive_launcher` undoes that."""
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher is None or os.environ.get("LOCAL_RANK", "0") == "0":
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        sys.exit(1)


def outlive_launcher() -> None:
    """Undo that. Another signal stays: PyTorch sets one for processes that it spawns."""
    found = ctypes.c_int()
    _prctl(_PR_GET_PDEATHSIG, ctypes.byref(found))
    if found.value == signal.SIGKILL:
        _prctl(_PR_SET_PDEATHSIG, 0)


def _prctl(option: int, argument: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, argument)
