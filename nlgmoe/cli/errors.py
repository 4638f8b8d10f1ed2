"""One formatter for both commands: a mistake ends as one line on stderr and an exit code.

    error: model.config.moe.top_k=9 (run.yaml, line 4) must be between 1 and the smallest num_experts (4)

Exit code 2: the command line or a configuration is wrong, nothing was run. 1: it failed while running. 0: it ran to its end, or
was told to stop while training and has saved (`run/keeper.py`). 128 + a signal's number: it was told to stop and
has not saved, such as 130 for Ctrl+C before training, or pressed twice. `NLGMOE_TRACEBACK=1` shows the traceback before the line.

An error that all ranks have alike (`on_every_rank`: a wrong command, or what they agreed on) is printed by the first rank of each
machine.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from nlgmoe.cli.tracebacks import being_restored, failed_logger, imported_in, in_users_code, is_complaint, raised_in
from nlgmoe.validation import SettingError

USAGE, FAILURE, INTERRUPTED = 2, 1, 128 + signal.SIGINT
FIRST_RANK_SECONDS = 30.0  # that other ranks wait for it: on a busy machine their starts are far apart
_ASK_FOR_TRACEBACK = "set NLGMOE_TRACEBACK=1 for the traceback"
# What collectives of gloo and NCCL say on a rank whose partner is gone or hangs.
_OF_ANOTHER_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
    "Timeout(ms)",
    "pair closure",
    "waiting for clients",
    "communicator was aborted",
    "got 0 bytes",
)
_WRONG_CALL = re.compile(r"([\w.]+)\(\) (?:takes|missing|got)")
# The innermost frame and the message of the traceback that a data-loading process sends.
_OF_A_WORKER = re.compile(
    r'^Caught \w+ in DataLoader worker process.*  File "(?P<file>[^"\n]+)", line \d+.*?\n[\w.]+: (?P<text>.*)',
    re.DOTALL,
)


class UsageError(SettingError):
    """A command line or configuration that cannot be run; the message is the line that people read."""


class Failures(ValueError):
    """Several things found wrong while running: a line each."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class UsageErrors(Failures, UsageError):
    """Several mistakes found at once: a line each."""


@contextmanager
def one_line_errors(trains: bool = False) -> Iterator[None]:
    """End the process with one line where the block raises.

    Args:
        trains: to be told too if the reader of standard output has ended.

    Raises:
        SystemExit: in place of any other exception, with the exit code.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, which wants none of it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    threading.excepthook = _print_error_of_thread
    try:
        with _imports_end_with_an_error():
            yield
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning has shut down in good order, and says 1
            raise SystemExit(INTERRUPTED) from None
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_ended():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not trains:  # it has seen enough, such as `head`
                raise SystemExit(FAILURE) from None
            error.filename = "standard output"
            error.strerror = "its reader has ended, and with it the run; go on with --ckpt_path auto, output to a file"
        if getattr(error, "on_every_rank", False):
            _wait_for_first_rank()
        if os.environ.get("NLGMOE_TRACEBACK") == "1":
            traceback.print_exc()
        for line in error.messages if isinstance(error, Failures) else [describe(error)]:
            print(f"error: {line}", file=sys.stderr)
        of_setting = isinstance(error, SettingError) or type(error).__name__ == "MisconfigurationException"
        if not isinstance(error, OSError):  # a disk that is full is no wrong setting
            of_setting |= (failed_logger(error) or ("", False))[1]
        too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
        raise SystemExit(USAGE if of_setting or too_long else FAILURE) from error


@contextmanager
def _imports_end_with_an_error() -> Iterator[None]:
    """Raise an error where a module of a user's ends the program as it is imported, with whatever exit code."""
    try:
        yield
    except SystemExit as end:
        if (module := imported_in(end)) is None:
            raise
        raise UsageError(
            f"{module} ends the program where it is imported (SystemExit: {one_line(str(end)) or 0}); put what it runs below "
            'if __name__ == "__main__":'
        ) from end


def _reader_has_ended() -> bool:
    """Return whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _print_error_of_thread(raised: threading.ExceptHookArgs) -> None:
    """Print one line, where Python prints a traceback: as of the thread that writes TensorBoard's files."""
    if os.environ.get("NLGMOE_TRACEBACK") == "1":
        threading.__excepthook__(raised)
    elif raised.exc_value is not None and not isinstance(raised.exc_value, SystemExit):
        name = "" if raised.thread is None else f" {raised.thread.name}"
        print(f"error: in thread{name}: {describe(raised.exc_value)}", file=sys.stderr)


def _wait_for_first_rank() -> None:
    """On another rank than the machine's first one, wait for that one to print the same error, and to end this process with it.

    That is the launcher's work; where it started this process itself, its end is seen here. Returns if nothing comes: an error is
    rather printed twice than never.

    Raises:
        SystemExit: the process that started this one is gone.
    """
    launched = "MASTER_PORT" in os.environ or "SLURM_NTASKS" in os.environ  # else LOCAL_RANK alone is left by something
    if not launched or (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0":
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    parent, patience = os.getppid(), time.monotonic() + FIRST_RANK_SECONDS
    while time.monotonic() < patience:
        if os.getppid() != parent:
            raise SystemExit(FAILURE)
        time.sleep(0.1)


def describe(error: BaseException) -> str:
    """Return the line for an exception; an unexpected one also names its type and how to see the traceback."""
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # on a GPU, on a CPU
        return (
            f"{one_line(str(error))}; lower data.micro_batch_size or model.loss_chunk_size, or set "
            f"model.activation_checkpointing to true ({_ASK_FOR_TRACEBACK})"
        )
    # PyTorch raises a worker's exception again here, with the worker's traceback as its text.
    if worker := _OF_A_WORKER.search(str(error)):
        ours = f"{os.sep}nlgmoe{os.sep}" in worker["file"] and isinstance(error, ValueError | ImportError)
        text = one_line(worker["text"])
        if ours or isinstance(error, OSError):
            return text
        return f"unexpected {type(error).__name__}: {text}; {_ASK_FOR_TRACEBACK}"
    if "DataLoader worker (pid" in str(error):
        return (
            f"{one_line(str(error))} Or a data file was cut while it was read (Bus error), or memory is full (Killed)"
        )
    if isinstance(error, UnicodeEncodeError) and error.encoding == "utf-8":  # as Python reads names in the file system
        return f"{one_line(ascii(error.object), 100)} is not text in UTF-8; rename what it names"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[error.start]!a} cannot be written as {error.encoding}; set PYTHONUTF8=1"
    if isinstance(error, OSError) and error.strerror:
        file = error.filename if error.filename2 is None else error.filename2
        if error.errno == errno.ENOSPC and file is None:
            return f"{error.strerror}; make room and run this again, a training with --ckpt_path auto"
        return f"{file}: {error.strerror}" if file is not None else error.strerror
    if (logger := failed_logger(error)) is not None:
        return (
            f"trainer.logger: {logger[0]} fails: {one_line(str(error))} ({type(error).__name__}); docs/metrics.md has its "
            "settings, and NLGMOE_TRACEBACK=1 shows the traceback"
        )
    if any(sign in str(error) for sign in _OF_ANOTHER_RANK):
        rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
        return f"rank {rank} stops because another rank has stopped or does not answer; what is wrong is its error, not this"
    if type(error).__name__ == "DistNetworkError":
        address = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}"
        return f"ranks cannot meet at {address} ({one_line(str(error))}); set MASTER_PORT to a free port there, or unset it"
    if is_complaint(error):
        return one_line(str(error))
    if isinstance(error, RecursionError) and raised_in(error).split(".")[0] in ("json", "yaml"):
        return "a file is nested too deeply to be read"
    if (checkpoint := being_restored(error)) is not None:
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        return f"{checkpoint}: its state cannot be restored ({reason}); use another checkpoint"
    if (
        isinstance(error, TypeError)
        and (called := _WRONG_CALL.match(str(error)))
        and raised_in(error).startswith("lightning")
    ):
        return f"{one_line(str(error))}: give {called[1]} the arguments that it has in its base class; {_ASK_FOR_TRACEBACK}"
    raised = f"{type(error).__name__}: {one_line(str(error))}; {_ASK_FOR_TRACEBACK}"
    return f"unexpected {raised}" if (place := in_users_code(error)) is None else f"{place}: {raised}"


def one_line(text: str, limit: int = 600) -> str:
    """`text` on one line of at most `limit` characters."""
    joined = " ".join(text.split())
    return joined if len(joined) <= limit else f"{joined[: limit - 4]} ..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the closest known word, or nothing."""
    close = difflib.get_close_matches(word, sorted(set(known)), n=1)
    return f"; did you mean {close[0]}?" if close else ""
