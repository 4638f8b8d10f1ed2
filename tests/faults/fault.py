"""A fault that waits inside a training process for its moment. Nothing in the product knows of it.

Python tells of a file-system call before it makes it (audit events, PEP 578), whoever makes it. Those that name a checkpoint
are counted, and at the chosen one, or a chosen time after it, the fault happens.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Moment = Literal["training", "writing", "renaming", "deleting"]


@dataclass(frozen=True)
class Fault:
    """What happens, and when.

    Attributes:
        action: `kill`: SIGKILL. `fill`: from now on no file of this process can grow beyond `limit` bytes, as if the disk
            were full (EFBIG in place of ENOSPC).
        moment: events that count. `training`: it has begun. `writing`: a checkpoint's folder or a file in it is made or
            flushed. `renaming`: a checkpoint gets or loses its name or a link. `deleting`: a checkpoint's folder, or a file
            of it, is deleted.
        count: the how-manieth event of that kind, from 1.
        delay: seconds to wait after the event, while the process goes on.
        rank: the rank that counts, and suffers.
        alone: whether only this rank is killed, not the whole process group.
        limit: of `fill`, in bytes.
    """

    moment: Moment
    count: int = 1
    action: Literal["kill", "fill"] = "kill"
    delay: float = 0.0
    rank: int = 0
    alone: bool = False
    limit: int = 0

    def environment(self, report: Path) -> dict[str, str]:
        """For the process that is to suffer it; where it happened is written to `report`."""
        return {"FAULT": json.dumps(asdict(self)), "FAULT_REPORT": str(report)}


def arm() -> None:
    """Let the environment's fault wait in this process; nothing if there is none, or for another rank."""
    text = os.environ.get("FAULT")
    rank = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)
    if text is not None and (fault := Fault(**json.loads(text))).rank == rank:
        sys.addaudithook(_Bomb(fault, Path(os.environ["FAULT_REPORT"])))


class _Bomb:
    def __init__(self, fault: Fault, report: Path) -> None:
        self._fault, self._report = fault, report
        self._left, self._doomed = fault.count, ""

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self._left <= 0:
            return
        found = self._classify(event, args)
        if found is None or found[0] != self._fault.moment:
            return
        self._left -= 1
        if self._left > 0:
            return
        if self._fault.delay:
            threading.Thread(target=self._happen, args=(found[1],), daemon=True).start()
        else:
            self._happen(found[1])

    def _classify(self, event: str, args: tuple[Any, ...]) -> tuple[Moment, str] | None:
        """The moment that an audit event belongs to, and the call in words."""
        paths = [os.fsdecode(arg) for arg in args[:2] if isinstance(arg, str | bytes | os.PathLike)]
        path = paths[0] if paths else ""
        words = f"{event.removeprefix('os.').removeprefix('shutil.')} {' -> '.join(map(_short, paths))}"
        if event == "open":
            if "/.versions.json.writing-" in path and args[1] == "w":
                return "training", "training"
            return ("writing", f"open {_short(path)}") if ".ckpt.writing-" in path else None
        if event == "os.mkdir" and ".ckpt.writing-" in path:
            return "writing", words
        if event == "shutil.rmtree":
            self._doomed = path if ".ckpt" in path and ".writing-" not in path and os.path.exists(path) else ""
            return ("deleting", words) if self._doomed else None
        if event in ("os.remove", "os.rmdir") and self._doomed and ".ckpt" not in path:  # relative to a folder's handle
            return "deleting", f"{words} of {_short(self._doomed)}"
        if event in ("os.rename", "os.symlink", "os.remove") and any(".ckpt" in path for path in paths):
            return "renaming", words
        return None

    def _happen(self, words: str) -> None:
        fault = self._fault
        time.sleep(fault.delay)
        after = f"{fault.delay * 1000:.0f} ms after: " if fault.delay else "before: "
        self._report.write_text(after + words)
        if fault.action == "fill":
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.limit, resource.RLIM_INFINITY))
        elif fault.alone:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.killpg(os.getpgrp(), signal.SIGKILL)


def _short(path: str) -> str:
    """The last two parts of a path in a checkpoint's folder, else the last one; without the process's number."""
    parts = Path(path).parts
    kept = parts[-2:] if len(parts) > 1 and ".ckpt" in parts[-2] else parts[-1:]
    return re.sub(r"-\d+(?=/|$)", "", "/".join(kept)) if ".ckpt." in path else "/".join(kept)
