"""A process that is aborted (SIGABRT) ends with one line that says why, and takes the processes it has started along.

NCCL's collectives time out in a thread of PyTorch, which aborts the process: no Python code runs after that. But the signal
handler that Python installs first writes the signal's number into a pipe, in C. Another process reads it: this file, run as a
program. It uses the standard library alone.

    python abort_watch.py LINE PID ...     print LINE and kill the PIDs once a SIGABRT is read from standard input
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any


class AbortWatch:
    """Watches this process until `stop`; made in the main thread.

    Args:
        line: what is printed to standard error if this process is aborted.
        children: processes that are killed then.
    """

    def __init__(self, line: str, children: Sequence[int] = ()) -> None:
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # Python asks for that
        command = [sys.executable, "-I", __file__, line, *map(str, children)]
        # In a session of its own: Ctrl+C in the terminal is not meant for it.
        self._process: subprocess.Popen[bytes] = subprocess.Popen(command, stdin=read, start_new_session=True)
        os.close(read)
        self._handler_before: Any = signal.signal(signal.SIGABRT, _abort)
        self._pipe_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def stop(self) -> None:
        """Let the other process end."""
        signal.set_wakeup_fd(self._pipe_before)
        signal.signal(signal.SIGABRT, self._handler_before)
        os.close(self._write)
        self._process.wait()


def _abort(number: int, frame: FrameType | None) -> None:
    """Die of a SIGABRT that came from outside; after one of this process's own, Python never comes to call this."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _watch(line: str, *children: str) -> None:
    while number := os.read(0, 1):  # one byte for each signal that Python handles; nothing at the process's end
        if number[0] == signal.SIGABRT:
            print(line, file=sys.stderr, flush=True)
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            return


if __name__ == "__main__":
    _watch(*sys.argv[1:])
