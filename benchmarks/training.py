"""Train runs of `train.py fit`: some at a time, each in a process of its own, resumed where they were stopped."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from tqdm import tqdm

from benchmarks.runs import ROOT
from nlgmoe.validation import RunError

POLL = 5.0  # seconds between looks at the runs' metrics
SILENCE = 120.0  # seconds between lines of progress where there is no terminal for a bar


class Launcher:
    """Runs commands of `nlgmoe` and `train.py`, each with one thread in a process of its own."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()

    def __call__(self, command: list[str], log: Path, tree: Path) -> int:
        """Run a command with the code of a folder, append its output to a file, and return its exit code."""
        path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        words = [sys.executable, *command]
        with (
            log.open("a") as file,
            subprocess.Popen(words, cwd=tree, stdout=file, stderr=subprocess.STDOUT, env=environment) as process,
        ):
            self._running.add(process)
            code = process.wait()
            self._running.discard(process)
            return code

    def end(self) -> None:
        """Let the running commands save a checkpoint and end."""
        for process in list(self._running):
            process.terminate()


def call(launch: Launcher, name: str, command: list[str], log: Path, tree: Path) -> None:
    """Run a command.

    Raises:
        RunError: it failed; the message has the last line of its log.
    """
    if code := launch(command, log, tree):
        lines = log.read_text().rstrip().splitlines() if log.exists() else []
        raise RunError(f"{name} ended with exit code {code}: {lines[-1] if lines else ''} ({log})")


@dataclass(frozen=True)
class Run:
    """A run of `train.py fit`.

    Attributes:
        name: of messages.
        folder: of its files.
        files: of settings, or their text as JSON.
        steps: optimizer steps.
        trunk: the checkpoint that it begins from; None: random weights.
        start: step of `trunk`.
        keep: its checkpoints stay after its line has ended.
        tree: folder of the code.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    steps: int
    trunk: Path | None = None
    start: int = 0
    keep: bool = False
    tree: Path = ROOT

    @property
    def has_ended(self) -> bool:
        """True if it has its result."""
        return (self.folder / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """What it wrote at its end."""
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    @property
    def loss(self) -> float:
        """Final validation loss."""
        loss = self.summary["val_loss"]
        if loss is None:
            raise RunError(f"{self.folder} ended with a validation loss that is not finite")
        return float(loss)

    @property
    def done(self) -> int:
        """Steps that were taken, as far as they are logged."""
        if self.has_ended:
            return self.steps - self.start
        file = self.folder / "metrics.csv"
        rows = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
        last = max((int(row["step"]) for row in rows if (row["step"] or "").isdigit()), default=-1)
        return max(0, last + 1 - self.start)

    def train(self, launch: Launcher) -> str:
        """Train it, or what is missing of it, and return a few words about its result."""
        self.folder.mkdir(parents=True, exist_ok=True)
        start = "auto" if self.trunk is None or (self.folder / "checkpoints").exists() else self.trunk
        command = ["train.py", "fit", *(part for file in self.files for part in ("--config", file))]
        command += [f"--trainer.default_root_dir={self.folder}", f"--ckpt_path={start}"]
        call(launch, self.name, command, self.folder / "log.txt", self.tree)
        if not self.has_ended:
            raise RunError(f"{self.name} was stopped; start the command again, and it goes on")
        return f"validation loss {self.loss:.4f}"


def train(lines: Sequence[Sequence[Run]], jobs: int, launch: Launcher) -> None:
    """Train lines of runs, some lines at a time, each in its order, with a progress bar over all steps.

    Raises:
        RunError: a run failed; those that are running are stopped.
    """
    runs = [run for line in lines for run in line]
    total, before, begun = sum(run.steps - run.start for run in runs), sum(run.done for run in runs), time.monotonic()
    stopped, spoken = Event(), begun
    bar = tqdm(total=total, initial=before, unit="step", smoothing=0, disable=None)

    def progress() -> tuple[int, str]:
        done = sum(run.done for run in runs)
        if done == before:
            return done, "no step yet"
        left = (time.monotonic() - begun) / (done - before) * (total - done)
        return done, time.strftime("ends about %a %H:%M", time.localtime(time.time() + left))

    def in_order(line: Sequence[Run]) -> None:
        for run in line:
            if not run.has_ended and not stopped.is_set():
                words = run.train(launch)
                tqdm.write(f"{time.strftime('%H:%M')} {run.name}: {words}; {progress()[1]}")
        for run in line:
            if not run.keep and not stopped.is_set():
                shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)

    def or_stop(line: Sequence[Run]) -> None:
        try:
            in_order(line)
        except BaseException:
            stopped.set()  # here: a pool begins its next line before `wait` returns
            raise

    with bar, ThreadPoolExecutor(jobs) as pool:
        waiting: set[Future[None]] = {pool.submit(or_stop, line) for line in lines}
        try:
            while waiting:
                ended, waiting = wait(waiting, POLL, FIRST_COMPLETED)
                done, end = progress()
                bar.update(done - bar.n)
                bar.set_postfix_str(end)
                if bar.disable and time.monotonic() - spoken > SILENCE:
                    spoken = time.monotonic()
                    print(f"{time.strftime('%H:%M')} step {done:,} of {total:,} of all runs; {end}", flush=True)
                for future in ended:
                    future.result()
        except BaseException as error:
            stopped.set()
            launch.end()
            if not isinstance(error, Exception):  # Ctrl+C, a signal
                tqdm.write(f"stopped at step {progress()[0]:,} of {total:,} of all runs; the same command continues")
            raise
