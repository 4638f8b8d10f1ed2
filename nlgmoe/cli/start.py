"""Entry points of `train.py` and `nlgmoe`. Ctrl+C also ends them during their imports, which take seconds."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from types import ModuleType

from nlgmoe.cli.errors import INTERRUPTED, UsageError, one_line_errors

_OF_LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID", "MASTER_PORT"),
)


def _check_environment() -> None:
    """Check the numbers that a launcher gives to its ranks, which Lightning reads as it is imported.

    Raises:
        UsageError: one is no number.
    """
    if os.environ.get("COLUMNS", "").strip() == "1":
        del os.environ["COLUMNS"]  # Lightning's tables divide by it, less one
    for name in _OF_LAUNCHERS:
        value = os.environ.get(name, "0").strip()
        if not value:
            del os.environ[name]  # an empty one is as one that is not set
        elif not value.removeprefix("-").isdecimal():
            raise UsageError(
                f"the environment variable {name}={value} is no whole number; unset it, or start ranks by torchrun or srun"
            )
        elif name == "MASTER_PORT" and not 0 <= int(value) < 2**16:
            raise UsageError(f"the environment variable MASTER_PORT={value} is no port; set it to a number up to 65535")


def train() -> None:
    """Run `train.py`."""
    with one_line_errors():
        _check_environment()
        import_interruptibly("nlgmoe.cli.train").main()


def nlgmoe() -> None:
    """Run the `nlgmoe` command."""
    # For a configuration's own modules, behind all others; `python train.py` has its folder too.
    sys.path.append(os.getcwd())
    with one_line_errors():
        _check_environment()
        importlib.import_module("nlgmoe.commands.main").main()


def import_interruptibly(module: str) -> ModuleType:
    """Import a module; Ctrl+C ends the process at once."""
    handler, in_main = signal.getsignal(signal.SIGINT), threading.current_thread() is threading.main_thread()
    if handler is not signal.default_int_handler or not in_main:
        return importlib.import_module(module)
    # Not by KeyboardInterrupt: code of other packages that runs while they are imported may catch it, or print it.
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        return importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, handler)
