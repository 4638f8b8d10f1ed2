"""Data-loading processes leave signals to the training process, which saves before it ends (`run/keeper.py`)."""

from __future__ import annotations

import os
import signal
import threading


def ignore_worker_signals(worker: int) -> None:
    """Ignore Ctrl+C, SIGUSR1 and SIGUSR2, and SIGTERM unless it comes from the process that started this one.

    Terminals, Slurm and DeepSpeed's launcher send a signal to every process there is, and training cannot reach its next
    step without its batches. For `DataLoader(worker_init_fn=...)`.
    """
    signal.set_wakeup_fd(-1)  # it is the training process's, for that process's own signals
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Blocked, and read one by one by a thread: a handler does not get the sender of a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
