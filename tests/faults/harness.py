"""Runs of train.py that faults happen to, and what has to be true of them.

A run is started as its user starts it: the same command each time, `--ckpt_path auto`, until it ends by itself.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlgmoe.checkpoint.portable import PortableCheckpointIO
from tests.distributed.cells import TINY_ON_RANKS
from tests.faults.fault import Fault
from tests.processes import ROOT, Started, processes_of_group

STEPS, SAVE_EVERY = 48, 3
SETTINGS = [
    *TINY_ON_RANKS,
    "--model.schedule.warmup_tokens=64",
    f"--model.train_tokens={STEPS * 4 * 32}",
    "--data.micro_batch_size=2",
    "--data.global_batch_size=4",
    "--data.max_eval_windows=4",
    "--trainer.val_check_interval=16",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
]
TIMEOUT_SECONDS = 60  # of the ranks' strategy: also bounds how far apart they may start
ON_TWO_RANKS = [
    "--trainer.strategy=nlgmoe.ExpertParallelStrategy",
    "--trainer.strategy.init_args.expert_parallel_size=2",
]
NOT_REPEATABLE = ("train/tokens_per_second", "train/tflops_per_second", "time/", "memory/")


@dataclass(frozen=True)
class Ended:
    """How a start of the command ended.

    Attributes:
        code: the exit status of the process that was started; negative: a signal's number.
        errors: lines of all ranks that begin with `error: `, without that.
        output: everything they printed.
        happened: when the fault happened, in words; None if it did not.
        seconds_after: from the end of the first process to the end of the last one.
    """

    code: int
    errors: list[str]
    output: str
    happened: str | None
    seconds_after: float


@dataclass
class Run:
    """A training run in a folder of its own.

    Args:
        folder: the run folder.
        data: the corpus.
        ranks: 1, or 2 with expert-parallel degree 2.
        timeout_seconds: as the ranks' strategy takes it.
    """

    folder: Path
    data: Path
    ranks: int = 1
    timeout_seconds: float = TIMEOUT_SECONDS
    starts: int = field(default=0, init=False)

    @property
    def settings(self) -> list[str]:
        """train.py's arguments, without resuming."""
        checkpoints = {
            "class_path": "nlgmoe.callbacks.SaveCheckpoints",
            "init_args": {"every_n_steps": SAVE_EVERY, "keep": 1},
        }
        ranks = []
        if self.ranks > 1:
            ranks = [*ON_TWO_RANKS, f"--trainer.strategy.init_args.timeout_seconds={self.timeout_seconds}"]
        return [
            *(*SETTINGS, *ranks),
            f"--data.data_dir={self.data}",
            f"--trainer.default_root_dir={self.folder}",
            f"--trainer.callbacks={json.dumps([checkpoints])}",
        ]

    def start(self, fault: Fault | None = None) -> Ended:
        """Start the command, and wait until none of its processes is left."""
        return self.launch([f"--trainer.devices={self.ranks}"], fault).wait()

    def launch(
        self, args: Sequence[str], fault: Fault | None = None, launcher: Sequence[str] = (sys.executable,)
    ) -> Launched:
        """Start the command, in a process group of its own."""
        self.starts += 1
        output = self.folder.with_name(f"{self.folder.name}.{self.starts}.txt")
        report = output.with_suffix(".fault")
        script = ROOT / ("train.py" if fault is None else "tests/faults/train_with_fault.py")
        environment = {key: value for key, value in os.environ.items() if not key.endswith("RANK")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        environment |= {} if fault is None else fault.environment(report)
        command = [*launcher, str(script), "fit", *self.settings, "--ckpt_path=auto", *args]
        if command[0] == sys.executable:
            return Launched(Started(command[1:], output, output, environment, new_session=True), output, report)
        with output.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        return Launched(process, output, report)

    def checkpoints(self) -> dict[str, int]:
        """Name and step of every checkpoint that has its final name.

        Raises:
            ValueError: one of them cannot be read.
        """
        found = [path for path in self.folder.rglob("*.ckpt") if not path.name.startswith(".") and path.exists()]
        return {path.name: PortableCheckpointIO().load_checkpoint(path)["global_step"] for path in found}

    def leftovers(self) -> set[str]:
        """Names of folders that a process did not live to finish or to delete."""
        return {path.name for path in self.folder.rglob(".*.ckpt.*")}

    def summary(self) -> dict[str, Any]:
        """`summary.json`."""
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found

    def rows(self) -> list[dict[str, str]]:
        """`metrics.csv`, in the order of writing; without what was not measured."""
        if not (self.folder / "metrics.csv").exists():
            return []
        with (self.folder / "metrics.csv").open(newline="") as file:
            return [
                {key: value for key, value in row.items() if value and not key.startswith(NOT_REPEATABLE)}
                for row in csv.DictReader(file)
            ]

    def trained_steps(self) -> list[int]:
        """The step of each row about training, from 0."""
        return [int(row["step"]) for row in self.rows() if "train/loss" in row]


@dataclass(frozen=True)
class Launched:
    """A command that runs."""

    process: subprocess.Popen[bytes] | Started
    output: Path
    report: Path

    def wait(self, timeout: float = 300) -> Ended:
        """Until none of its processes is left.

        Raises:
            AssertionError: some still run after `timeout` seconds; they have been killed.
        """
        until = time.monotonic() + timeout
        try:
            code = self.process.wait(timeout)
            ended = time.monotonic()
            while self.processes():
                assert time.monotonic() < until, f"processes outlive {self.process.args}"
                time.sleep(0.05)
            after = time.monotonic() - ended
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {timeout} s:\n{self.output.read_text()[-3000:]}") from None
        finally:
            self.kill()
        text = self.output.read_text()
        errors = re.findall(r"^(?:\[.*?\]:)?error: (.*)", text, re.MULTILINE)
        return Ended(code, errors, text, self.report.read_text() if self.report.exists() else None, after)

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        if self.processes():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def processes(self) -> list[Path]:
        """Folders in /proc of its processes that are alive."""
        return processes_of_group(self.process.pid)


def differences(run: Run, undisturbed: Run) -> dict[str, float]:
    """What of a run's results is not exactly that of the undisturbed one, and by how much, relatively.

    Args:
        run: at its end.
        undisturbed: at its end.

    Raises:
        AssertionError: a row is missing, or there twice.
    """
    found: dict[str, float] = {}

    def compare(name: str, mine: float, other: float) -> None:
        if mine != other and not (math.isnan(mine) and math.isnan(other)):
            found[name] = max(found.get(name, 0.0), abs(mine - other) / max(abs(other), 1e-12))

    for name in ("steps", "tokens", "train_loss", "val_loss"):
        compare(name, run.summary()[name], undisturbed.summary()[name])
    expected = {(int(row["step"]), "train/loss" in row): row for row in undisturbed.rows()}
    rows = [(int(row["step"]), "train/loss" in row) for row in run.rows()]
    assert rows == list(expected), f"rows that only one of the runs has: {sorted(set(rows) ^ expected.keys())}"
    for row in run.rows():
        other = expected[int(row["step"]), "train/loss" in row]
        assert row.keys() == other.keys(), row.keys() ^ other.keys()
        for key, value in row.items():
            compare(key, float(value), float(other[key]))
    return found
