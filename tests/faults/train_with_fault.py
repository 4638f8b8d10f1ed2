"""train.py with a fault at one of its file-system calls. Its arguments are train.py's; `FAULT` has a `Fault` as JSON.

Python reports a file-system call before it makes it (audit events, PEP 578). Those that write, rename or delete a checkpoint
are counted. Lightning starts further ranks by the name of this script, so each of them counts its own.
"""

import json
import os
import resource
import signal
import sys
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Fault:
    """A fault of one rank.

    Attributes:
        call: number of the call at which it happens, from 1.
        rank: the rank that counts.
        action: `kill all`: SIGKILL to all processes. `kill rank`: to this one. `fill`: from now on no file of this process
            can grow beyond 100 kB, as if the disk were full (EFBIG in place of ENOSPC).
    """

    call: int
    rank: int = 0
    action: Literal["kill all", "kill rank", "fill"] = "kill all"


def arm(fault: Fault) -> None:
    """Count the calls of this process, and let the fault happen."""
    calls = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        path = str(arguments[0]) if arguments else ""
        writes = event == "open" and ".ckpt.writing" in path
        if not writes and not (event in ("os.mkdir", "os.rename", "os.symlink", "os.remove") and ".ckpt" in path):
            return
        calls += 1
        if calls != fault.call:
            return
        if fault.action == "fill":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        elif fault.action == "kill rank":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    fault = Fault(**json.loads(os.environ["FAULT"]))
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) == fault.rank:
        arm(fault)
    from nlgmoe.cli.train import main

    main()
