"""When this process is aborted (SIGABRT), print one line with the reason and kill the processes that it started.

If one of NCCL's collectives times out, a thread of PyTorch aborts the process, and no Python code runs after that. But the signal
handler that Python installs first writes the signal's number to a pipe, in C. Another process reads it: this file, run as a
program that needs the standard library only.

    python abort_watch.py LINE PID ...     print LINE and kill the PIDs when a SIGABRT is read from standard input
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
    """Watch this process until `stop`; create it in the main thread.

    Args:
        line: printed to standard error if this process is aborted.
        children: processes to kill in that case.
    """

    def __init__(self, line: str, children: Sequence[int] = ()) -> None:
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # required by `set_wakeup_fd`
        command = [sys.executable, "-I", __file__, line, *map(str, children)]
        # A new session, so that Ctrl+C in the terminal does not end it.
        self._process: subprocess.Popen[bytes] = subprocess.Popen(command, stdin=read, start_new_session=True)
        os.close(read)
        # None is a handler in C, such as faulthandler's, which Python cannot restore.
        self._previous_handler: Any = signal.signal(signal.SIGABRT, _abort) or signal.SIG_DFL
        self._previous_pipe = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def stop(self) -> None:
        """End the other process."""
        signal.set_wakeup_fd(self._previous_pipe)
        signal.signal(signal.SIGABRT, self._previous_handler)
        os.close(self._write)
        self._process.kill()  # it would not find the pipe closed: data-loading processes, forked since, have it open
        self._process.wait()


def _abort(number: int, frame: FrameType | None) -> None:
    """Die of a SIGABRT sent by another process; after this process's own abort, Python never calls the handler."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _watch(line: str, *children: str) -> None:
    while number := os.read(0, 1):  # one byte for each signal that Python handles; empty when the process has ended
        if number[0] == signal.SIGABRT:
            print(line, file=sys.stderr, flush=True)
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            return


if __name__ == "__main__":
    _watch(*sys.argv[1:])
