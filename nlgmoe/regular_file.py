"""Refusing what is no file where one is expected: opening a FIFO would wait for another process, without a word."""

from __future__ import annotations

import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular(file: str | Path, remedy: str) -> None:
    """Check that what has this name is a regular file or a link to one. What is missing is for the caller to report.

    Raises:
        ValueError: it is a folder, FIFO, socket or device; the message ends with `remedy`.
    """
    try:
        mode = Path(file).stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise ValueError(f"{file} is {_KINDS[stat.S_IFMT(mode)]}, not a regular file; {remedy}")
