"""Two equal runs on two ranks, side by side for two hours; one of them is killed every ten minutes.

Both save every minute, validate, write texts and a report. Memory and open files of every process are sampled. At the end
both train to the same step, and are compared row by row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from nlgmoe.data.pocket_pile import prepare
from tests.faults.harness import ON_TWO_RANKS, ROOT, SETTINGS, Launched, Run, differences
from tests.faults.results import Results, commit

SAMPLE_SECONDS = 10
WARM_UP, WINDOW = 60.0, 20.0  # seconds of a process's CPU time, which other work does not change
CALLBACKS = [
    {"class_path": "nlgmoe.callbacks.SaveCheckpoints", "init_args": {"every_n_steps": None, "minutes": 1}},
    {"class_path": "nlgmoe.WriteReport"},
    {"class_path": "nlgmoe.callbacks.SampleText", "init_args": {"prompts": ["The king"], "max_new_tokens": 20}},
]
NEVER = 10**12  # tokens


@dataclass
class Soaked(Run):
    """A run without an end of its own, on two ranks, with the quickstart's callbacks."""

    ranks: int = 2
    timeout_seconds: float = 1800  # beside other work

    @property
    def settings(self) -> list[str]:
        """train.py's arguments, without resuming."""
        return [
            *(*SETTINGS, *ON_TWO_RANKS),
            f"--trainer.strategy.init_args.timeout_seconds={self.timeout_seconds}",
            f"--model.train_tokens={NEVER}",
            f"--model.schedule.decay_tokens={NEVER}",
            "--trainer.val_check_interval=200",
            "--trainer.log_every_n_steps=20",
            f"--data.data_dir={self.data}",
            f"--trainer.default_root_dir={self.folder}",
            f"--trainer.callbacks={json.dumps(CALLBACKS)}",
        ]


@dataclass
class Process:
    """What one process used over its life: (seconds of CPU time, bytes of its own memory, open files)."""

    samples: list[tuple[float, int, int]] = field(default_factory=list)

    def growth(self) -> float | None:
        """Relative growth of memory from the time after the warm-up to the last; None: it lived too briefly."""
        first, last = self._windows()
        return mean(each[1] for each in last) / mean(each[1] for each in first) - 1 if first and last else None

    def more_files(self) -> int | None:
        """How many more files were open in the last time than in that after the warm-up, at least."""
        first, last = self._windows()
        return min(each[2] for each in last) - min(each[2] for each in first) if first and last else None

    def _windows(self) -> tuple[list[tuple[float, int, int]], list[tuple[float, int, int]]]:
        end = self.samples[-1][0]
        if end < WARM_UP + 2 * WINDOW:
            return [], []
        first = [each for each in self.samples if 0 <= each[0] - WARM_UP < WINDOW]
        return first, [each for each in self.samples if end - each[0] < WINDOW]


class Watched:
    """A run that is started, sampled, killed and started again."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.lives: dict[tuple[int, int], Process] = defaultdict(Process)  # by start and process
        self.resumed_from: list[int] = []
        self._launched: Launched | None = None

    def start(self) -> None:
        """Start its command, which resumes from the newest checkpoint."""
        if self.run.starts:
            self.resumed_from.append(max(self.run.checkpoints().values(), default=0))
        self._launched = self.run.launch(["--trainer.devices=2"], launcher=["nice", sys.executable])

    def sample(self) -> None:
        """Note what each of its processes uses.

        Raises:
            AssertionError: it has ended.
        """
        assert self._launched is not None
        assert self._launched.processes(), self._launched.output.read_text()[-3000:]
        for process in self._launched.processes():
            try:
                memory = (process / "smaps_rollup").read_text()
                files = len(list((process / "fd").iterdir()))
                used = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
            except OSError:  # it has just ended
                continue
            own = next(int(line.split()[1]) for line in memory.splitlines() if line.startswith("Anonymous:"))
            life = self.lives[self.run.starts, int(process.name)]
            life.samples.append((sum(map(int, used)) / os.sysconf("SC_CLK_TCK"), own * 1024, files))

    def kill(self) -> None:
        """SIGKILL to all of its processes; none is left.

        Raises:
            AssertionError: some are left after a minute.
        """
        assert self._launched is not None
        self._launched.kill()
        until = time.monotonic() + 60
        while self._launched.processes():
            assert time.monotonic() < until, "processes outlive SIGKILL"
            time.sleep(0.1)

    def finish(self, steps: int) -> None:
        """Train to a step, and end.

        Raises:
            AssertionError: it fails.
        """
        self.resumed_from.append(max(self.run.checkpoints().values(), default=0))
        args = ["--trainer.devices=2", f"--trainer.max_steps={steps}"]
        ended = self.run.launch(args, launcher=["nice", sys.executable]).wait(1800)
        assert ended.code == 0, ended.output
        assert not self.run.leftovers(), self.run.leftovers()

    def used(self) -> dict[str, Any]:
        """Growth of memory and of open files over those lives of a process that were long enough; None: there is no such life."""
        growth = [found for each in self.lives.values() if (found := each.growth()) is not None]
        files = [found for each in self.lives.values() if (found := each.more_files()) is not None]
        peak = max(each[1] for life in self.lives.values() for each in life.samples)
        return {
            "lives": len(growth),
            "growth": max(growth, default=None),
            "more_files": max(files, default=None),
            "peak_bytes": peak,
        }


def soak(folder: Path, data: Path, minutes: float, every: float) -> dict[str, Any]:
    """Run both for `minutes`, kill one of them each `every` minutes, and compare them at their end.

    Raises:
        AssertionError: a run ended by itself, left something behind, or computed something else than the other.
    """
    calm, killed = (Watched(Soaked(folder / name, data)) for name in ("undisturbed", "killed"))
    calm.start(), killed.start()
    began, kills = time.monotonic(), 0
    while (passed := time.monotonic() - began) < minutes * 60:
        time.sleep(SAMPLE_SECONDS)
        calm.sample(), killed.sample()
        if passed > (kills + 1) * every * 60:
            killed.kill()
            killed.start()
            kills += 1
            print(f"{passed / 60:.0f} min: kill {kills}, resumes from step {killed.resumed_from[-1]}", flush=True)
    calm.kill(), killed.kill()
    steps = max(0, *calm.run.trained_steps(), *killed.run.trained_steps()) + 100
    for each in (calm, killed):
        each.finish(steps)
    # Lightning logs a step after its checkpoint is written: a kill in between loses the row of that step.
    found = differences(killed.run, calm.run)
    return {
        "minutes": minutes,
        "kills": kills,
        "steps": steps,
        "undisturbed": calm.used(),
        "killed": killed.used(),
        "resumed_from": killed.resumed_from,
        "differences": found,
    }


def main() -> None:
    """Soak, and write down what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120, help="how long both train (default: 120)")
    parser.add_argument("--every", type=float, default=10, help="minutes between two kills (default: 10)")
    args = parser.parse_args()
    data, results = ROOT / "data/pocket_pile", Results(commit())
    prepare(data, "pocket-4k")
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), data, args.minutes, args.every)
    print(json.dumps(found, indent=1))
    results.add("soak", found)


if __name__ == "__main__":
    main()
