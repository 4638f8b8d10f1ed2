"""Cost of a portable checkpoint of a gigabyte: MB a second, and the wait of a training step. 1.5 minutes.

    python -m benchmarks.checkpoint

A child process (or two gloo ranks, degree 2, ZeRO 2, one thread each) trains six steps, saves after every second one, and loads
the last save into the same model and optimizer. What is read has just been written: it comes from the page cache. The disk is
that of `TMPDIR`.
"""

from __future__ import annotations

import logging
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from benchmarks.timing import Benchmark, Part, Table
from nlgmoe import ExpertParallelStrategy, GPTConfig, MoEConfig, MoEGPTModule
from nlgmoe.model.counting import count_parameters
from tests.support.spawn import spawn
from tests.support.synthetic import SyntheticData
from tests.support.trainers import QUIET

CONFIG = GPTConfig(8192, 128, 6, 512, 8, moe=MoEConfig(10, token_dropping=False))
BYTES = 3 * 4 * count_parameters(CONFIG).total  # weights and two moments, fp32
RANKS = {"one process": 1, "two ranks": 2}


class Meter(Callback):
    """Times steps, saves and the load."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, list[float]] = {"step": [], "save": []}

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop it; save after every second step."""
        ended = time.perf_counter()
        self.seconds["step"].append(ended - self._started)
        if trainer.global_step % 2 == 0:
            trainer.save_checkpoint(self.path)
            self.seconds["save"].append(time.perf_counter() - ended)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Load."""
        started = time.perf_counter()
        checkpoint = trainer.strategy.load_checkpoint(self.path)
        trainer.strategy.load_model_state_dict(checkpoint)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        self.seconds["load"] = [time.perf_counter() - started]


def train(ranks: int, folder: Path) -> dict[str, float]:
    """Train in a child process; returns median seconds."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    meter = Meter(folder / "saved.ckpt")
    strategy: Any = ExpertParallelStrategy(2, expert_parallel_size=2) if ranks > 1 else "auto"
    options = {"accelerator": "cpu", "devices": ranks, "strategy": strategy, "limit_val_batches": 0} | QUIET
    trainer = Trainer(max_steps=6, callbacks=[meter], default_root_dir=folder, **options)
    trainer.fit(MoEGPTModule(CONFIG), SyntheticData(8192, CONFIG.seq_len, micro_batch_size=4 // ranks))
    return {name: statistics.median(values) for name, values in meter.seconds.items()}


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Return median seconds by layout, of two ranks the slower one's."""
    runs: dict[str, list[dict[str, float]]] = {layout: [] for layout in RANKS}
    for _ in range(rounds):
        for layout, ranks in RANKS.items():
            with TemporaryDirectory() as folder:
                every = spawn(ranks, train, ranks, Path(folder), folder=Path(folder))
            runs[layout].append({name: max(rank[name] for rank in every) for name in every[0]})
    return {
        layout: {name: statistics.median(run[name] for run in each) for name in each[0]}
        for layout, each in runs.items()
    }


def table(measured: dict[str, dict[str, float]]) -> Table:
    rows: list[Any] = []
    for layout, row in measured.items():
        rates = [f"{BYTES / 1e6 / row[name]:,.0f}" for name in ("save", "load")]
        rows.append([layout, *rates, *(f"{row[name]:.2f}" for name in ("step", "save"))])
    return [f"{BYTES / 1e6:.0f} MB", "written, MB/s", "read, MB/s", "a step, s", "a step waits, s"], rows


BENCHMARK = Benchmark("checkpoint", "performance.md", {"checkpoint": Part(measure, table, 2, threads=1)})

if __name__ == "__main__":
    BENCHMARK.run(__doc__)
