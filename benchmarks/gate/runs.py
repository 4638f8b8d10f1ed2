"""The runs of both sides: some at a time, resumed where they were stopped, with a progress bar over all steps."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from tqdm import tqdm

from benchmarks.gate.candidate import Side
from benchmarks.reproduce.cells import COOLDOWN
from benchmarks.reproduce.launching import Launch, end_running, fit
from benchmarks.runs import ROOT
from nlgmoe import load_model
from nlgmoe.validation import RunError

POLL = 5.0  # seconds between looks at the runs' metrics
SILENCE = 120.0  # seconds between lines of progress where there is no terminal for a bar


@dataclass(frozen=True)
class Run:
    """A run of one side.

    Attributes:
        side: candidate or baseline.
        seed: of weights and order.
        steps: optimizer steps.
        start: step of the side's whole run that it begins from; 0: random weights.
    """

    side: Side
    seed: int
    steps: int
    start: int = 0

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.side.home / (f"seed{self.seed}" + (f"-{self.steps}" if self.steps != self.side.scale.steps else ""))

    @property
    def has_ended(self) -> bool:
        """True if it has its result."""
        return (self.folder / "summary.json").exists()

    @property
    def loss(self) -> float:
        """Final validation loss."""
        loss = json.loads((self.folder / "summary.json").read_text())["val_loss"]
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

    def train(self, launch: Launch) -> None:
        """Train it, or what is missing of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        trunk = self.side.home / f"seed{self.seed}/checkpoints/step-{self.start}.ckpt"
        try:
            fit(launch, self.side.files(self.steps, self.seed), self.folder, ROOT, str(trunk) if self.start else "auto")
        except RunError as error:
            raise RunError(f"{self.side.name}: {error}") from error


def fingerprint(side: Side, out: Path, launch: Launch) -> str:
    """Return a hash of the weights after three training steps: of code, torch, machine and text; and of the overlays."""
    few = json.dumps({"trainer": {"max_steps": 3, "logger": False}, "data": {"max_eval_windows": 1}})
    folder = out / f"{side.name}-first-steps"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fit(launch, [*side.files(side.scale.steps, 1), few], folder, ROOT)
    digest = hashlib.sha256("".join(side.overlays).encode())
    for name, value in sorted(load_model(folder / "checkpoints/last.ckpt").state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    shutil.rmtree(folder)
    return digest.hexdigest()[:12]


def placed(side: Side, out: Path, launch: Launch) -> Side:
    """Return the side with the folder of its runs below `out`: another one if its code or settings have changed."""
    return replace(side, home=out / f"{side.name}-{fingerprint(side, out, launch)}")


def series(side: Side, seed: int, lengths: Sequence[int]) -> list[Run]:
    """Return the whole run of a seed, and shorter ones, which cool down from its constant part; in the order of training."""
    whole, every, runs = side.scale.steps, side.scale.milestones, []
    for steps in sorted({whole, *lengths}, reverse=True):
        constant = steps - round(COOLDOWN * steps)
        runs.append(Run(side, seed, steps, 0 if steps == whole else constant // every * every))
    return runs


def train(lines: Sequence[Sequence[Run]], jobs: int, launch: Launch) -> None:
    """Train lines of runs, some lines at a time, each in its order.

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
        return done, time.strftime("ends about %H:%M", time.localtime(time.time() + left))

    def in_order(line: Sequence[Run]) -> None:
        for run in line:
            if not run.has_ended and not stopped.is_set():
                run.train(launch)
                words = f"{run.side.name} {run.folder.name}: validation loss {run.loss:.4f}"
                tqdm.write(f"{time.strftime('%H:%M')} {words}; {progress()[1]}")
        for run in line:  # shorter runs of later gates begin from the baseline's whole ones
            if not stopped.is_set() and (run.side.overlays or run.start):
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
            end_running()
            if not isinstance(error, Exception):  # Ctrl+C, a signal
                tqdm.write(f"stopped at step {progress()[0]:,} of {total:,} of all runs; the same command continues")
            raise
