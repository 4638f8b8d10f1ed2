"""Entry points of `train.py` and `nlgmoe`. Ctrl+C also ends them during their imports, which take seconds."""

from __future__ import annotations

import importlib
import os
import signal
import sys

from nlgmoe.cli.errors import INTERRUPTED, one_line_errors


def train() -> None:
    """Run `train.py`."""
    _run("nlgmoe.cli.train")


def nlgmoe() -> None:
    """Run the `nlgmoe` command."""
    sys.path.append(
        os.getcwd()
    )  # for a configuration's own modules, behind all others; `python train.py` has its folder too
    _run("nlgmoe.commands.main")


def _run(module: str) -> None:
    with one_line_errors():
        handler = signal.getsignal(signal.SIGINT)
        if handler is signal.default_int_handler:
            # Not by KeyboardInterrupt: code of other packages that runs while they are imported may catch it, or print it.
            signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        main = importlib.import_module(module).main
        signal.signal(signal.SIGINT, handler)
        main()
