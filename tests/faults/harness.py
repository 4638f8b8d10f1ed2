"""Runs of train.py on two ranks that faults happen to: the same command each time, until it ends by itself."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from nlgmoe.checkpoint.portable import PortableCheckpointIO
from tests.faults.train_with_fault import Fault
from tests.support.commands import TINY_ON_RANKS
from tests.support.processes import ROOT, Started, processes_of_group

STEPS, SAVE_EVERY = 48, 3
TIMEOUT_SECONDS = 60  # of the ranks' strategy: also bounds how far apart they may start
CHECKPOINTS = {"class_path": "nlgmoe.callbacks.SaveCheckpoints", "init_args": {"every_n_steps": SAVE_EVERY, "keep": 1}}
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
    f"--trainer.callbacks={json.dumps([CHECKPOINTS])}",
    "--trainer.strategy=nlgmoe.ExpertParallelStrategy",
    "--trainer.strategy.init_args.expert_parallel_size=2",
]
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.endswith("RANK")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
NOT_REPEATABLE = ("train/tokens_per_second", "train/tflops_per_second", "time/", "memory/")


@dataclass(frozen=True)
class Ended:
    """How a start of the command ended.

    Attributes:
        code: exit status of the process that was started; negative: a signal's number.
        errors: lines of all ranks that begin with `error: `, without that.
        output: everything they printed.
        seconds_after: from the end of the first process to the end of the last one.
    """

    code: int
    errors: list[str]
    output: str
    seconds_after: float


@dataclass
class Run:
    """A training run on two ranks in a folder of its own."""

    folder: Path
    data: Path
    timeout_seconds: float = TIMEOUT_SECONDS
    starts: int = field(default=0, init=False)

    def start(self, fault: Fault | None = None) -> Ended:
        """Start the command, and wait until none of its processes is left."""
        environment = {} if fault is None else {"FAULT": json.dumps(asdict(fault))}
        script = ROOT / ("train.py" if fault is None else "tests/faults/train_with_fault.py")
        arguments = [str(script), *self.arguments(), "--trainer.devices=2"]
        output = self.next_output()
        started = Started(arguments, output, output, ENVIRONMENT | environment, new_session=True)
        return Launched(started, output, lambda: [int(path.name) for path in processes_of_group(started.pid)]).wait()

    def arguments(self) -> list[str]:
        timeout = f"--trainer.strategy.init_args.timeout_seconds={self.timeout_seconds}"
        places = [f"--data.data_dir={self.data}", f"--trainer.default_root_dir={self.folder}"]
        return ["fit", *SETTINGS, timeout, *places, "--ckpt_path=auto"]

    def next_output(self) -> Path:
        self.starts += 1
        return self.folder.with_name(f"{self.folder.name}.{self.starts}.txt")

    def newest(self) -> int:
        """Read every checkpoint completely; return the newest one's step, 0 if there is none."""
        paths = [path for path in self.folder.rglob("*.ckpt") if not path.name.startswith(".") and path.exists()]
        return max((PortableCheckpointIO().load_checkpoint(path)["global_step"] for path in paths), default=0)

    def leftovers(self) -> set[str]:
        return {path.name for path in self.folder.rglob(".*.ckpt.*")}

    def rows(self) -> list[dict[str, float]]:
        """Rows of `metrics.csv`, without what differs between two runs of one command."""
        with (self.folder / "metrics.csv").open(newline="") as file:
            return [
                {key: float(value) for key, value in row.items() if value and not key.startswith(NOT_REPEATABLE)}
                for row in csv.DictReader(file)
            ]

    def finish_as(self, undisturbed: Run) -> None:
        """Start the command without a fault, which resumes the newest checkpoint, and compare the results."""
        newest = self.newest()
        ended = self.start()
        assert ended.code == 0 and f"step-{newest}.ckpt" in ended.output, ended.output
        self.compare(undisturbed)

    def compare(self, undisturbed: Run) -> None:
        """Check that nothing is left over, and that the tables are the undisturbed run's."""
        assert not self.leftovers() and (self.folder / "summary.json").exists()
        for row, expected in zip(self.rows(), undisturbed.rows(), strict=True):
            assert row == pytest.approx(expected, rel=1e-6, nan_ok=True)


@dataclass(frozen=True)
class Launched:
    """A command that runs, and the numbers of its processes that are alive."""

    process: subprocess.Popen[bytes] | Started
    output: Path
    processes: Callable[[], list[int]]

    def wait(self, timeout: float = 300) -> Ended:
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
        return Ended(code, re.findall(r"^(?:\[.*?\]:)?error: (.*)", text, re.MULTILINE), text, after)

    def kill(self) -> None:
        for number in self.processes():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.process.wait()
