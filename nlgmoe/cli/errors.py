"""The end of a command: exit code 0, one line on stderr for an error that a user can correct, or a traceback.

    error: model.config.moe.top_k=9 (run.yaml, line 4) must be between 1 and the smallest num_experts (4)

| exit code | meaning |
|---|---|
| 0 | it ran to its end, or a signal ended training and a checkpoint was saved (`run/save_checkpoints.py`) |
| 2 | a setting or argument is wrong (`SettingError`, or Lightning's `MisconfigurationException`); nothing was run |
| 1 | damaged data, a full disk, a step that is not finite (`RunError`, `OSError`): one line; any other exception: a traceback |
| 128 + a signal's number | a signal ended it, nothing was saved: 130 for Ctrl+C twice, or before training; 141 in `... | head` |

`NLGMOE_TRACEBACK=1` prints the traceback before the line.
"""

from __future__ import annotations

import difflib
import importlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

from nlgmoe.validation import RunError, SettingError

INTERRUPTED = 128 + signal.SIGINT


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line if the block raises an expected error."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning has shut down, with exit code 1
            raise SystemExit(INTERRUPTED) from None
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_broken():  # its reader has ended, such as `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the flush at exit would raise again
            raise SystemExit(128 + signal.SIGPIPE) from None
        lines = describe(error)
        if lines is None:
            raise
        if os.environ.get("NLGMOE_TRACEBACK") == "1":
            traceback.print_exc()
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2 if is_wrong_setting(error) else 1) from error


def _stdout_is_broken() -> bool:
    """Return True if standard output is a pipe without a reader."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def is_wrong_setting(error: BaseException) -> bool:
    """Return True for a `SettingError`, and for Lightning's equivalent."""
    return isinstance(error, SettingError) or type(error).__name__ == "MisconfigurationException"


def describe(error: BaseException) -> list[str] | None:
    """Return the lines for an expected error; None for any other."""
    text, kind = str(error), type(error)
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in text
    if on_cpu or kind.__name__ == "OutOfMemoryError":
        remedy = "use a smaller batch (data.micro_batch_size, --batch-size), or activation_checkpointing"
        return [f"{one_line(text)}; {remedy}"]
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(error, RunError | OSError | SettingError) and f"\n{name}: " in text:
        # Of a data-loading process: PyTorch's text is the traceback.
        return [one_line(text.rpartition(f"\n{name}: ")[2])]
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        file = error.filename if error.filename2 is None else error.filename2
        return [f"{file}: {error.strerror}" if file is not None else error.strerror]
    if isinstance(error, RunError) or is_wrong_setting(error):
        return [one_line(line) for line in text.splitlines()]
    return None


def import_module(name: str, remedy: str) -> ModuleType:
    """Import a user's module.

    Raises:
        SettingError: its code raises an exception, or there is none; with the remedy.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        raise SettingError(f"cannot import {name} ({reason}); {remedy}") from error


def one_line(text: str, limit: int = 600) -> str:
    """Return `text` on one line of at most `limit` characters."""
    joined = " ".join(text.split())
    return joined if len(joined) <= limit else f"{joined[: limit - 4]} ..."


def did_you_mean(word: str, known: Iterable[str], full_names: Mapping[str, str] | None = None) -> str:
    """Return `; did you mean ...?` with the closest known word, or with its full name; empty if none is close."""
    close = difflib.get_close_matches(word, sorted(set(known)), n=1)
    return f"; did you mean {(full_names or {}).get(close[0], close[0])}?" if close else ""
