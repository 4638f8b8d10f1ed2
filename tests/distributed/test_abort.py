"""A rank that is aborted, as NCCL's time-outs do it, ends with one line and takes the ranks that it has started along."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from nlgmoe.callbacks import explain_abort
from nlgmoe.callbacks.explain_abort import ExplainAbort

ROOT = Path(__file__).parents[2]
# A thread that is not Python's aborts, as NCCL's watchdog does, while the main thread waits in C for another rank.
PROCESS = """
import ctypes, faulthandler, os, signal, subprocess, sys, threading, time
from nlgmoe.parallel.abort_watch import AbortWatch
child = subprocess.Popen(["sleep", "1000"])
faulthandler.enable()  # a handler in C
opened = len(os.listdir("/proc/self/fd"))
watch = AbortWatch("the line", [child.pid])
signal.signal(signal.SIGTERM, lambda *_: None)
os.kill(os.getpid(), signal.SIGTERM)
if sys.argv[1] == "is aborted":
    os.kill(os.getpid(), signal.SIGABRT)  # by another process, for Python
    time.sleep(10)
if sys.argv[1] == "aborts":
    threading.Timer(0.1, ctypes.CDLL(None).abort).start()
    ctypes.CDLL(None).sleep(1000)
if (worker := os.fork()) == 0:  # as data-loading processes are: with all open files
    time.sleep(1000)
watch.stop()
os.kill(worker, signal.SIGKILL)
print(child.poll(), signal.set_wakeup_fd(-1), len(os.listdir("/proc/self/fd")) - opened)
child.kill()
"""


def run(how: str) -> subprocess.CompletedProcess[str]:
    # The streams are closed when the last process that has them is gone: the child, too.
    return subprocess.run(
        [sys.executable, "-c", PROCESS, how], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("how", ["aborts", "is aborted"])
def test_an_aborted_process_says_why_and_takes_its_children_along(how: str) -> None:
    done = run(how)
    assert (done.returncode, done.stderr, done.stdout) == (-6, "the line\n", "")


def test_other_signals_and_ends_say_nothing() -> None:
    done = run("ends")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "None -1 0\n")


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_are_watched_by_the_one_that_has_started_them(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Watch:
        def __init__(self, line: str, children: list[int]) -> None:
            made.append((line, children))

        def stop(self) -> None:
            made.append("stopped")

    monkeypatch.setattr(explain_abort, "AbortWatch", Watch)
    launcher = _SubprocessScriptLauncher(None, ranks, 1)  # type: ignore[arg-type]
    launcher.procs = [SimpleNamespace(pid=7)]  # type: ignore[list-item]
    trainer: Any = SimpleNamespace(world_size=ranks, global_rank=0, strategy=SimpleNamespace(launcher=launcher))
    callback = ExplainAbort()
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    callback.on_exception(trainer, None, ValueError())  # type: ignore[arg-type]
    callback.teardown(trainer, None, "fit")  # type: ignore[arg-type]
    if ranks == 1:
        assert made == []
    else:
        (line, children), end = made
        assert (children, end) == ([7], "stopped")
        assert line.startswith("error: rank 0 was aborted (SIGABRT): another rank has stopped") and "\n" not in line
