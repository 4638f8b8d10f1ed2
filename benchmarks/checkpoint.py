"""What a portable checkpoint costs: speed of writing and reading, memory, and how long a training step waits for it.

    python -m benchmarks.checkpoint [--rounds 3] [--sizes small large] [--folder FOLDER]

A child process (or two gloo ranks, degree 2, ZeRO 2) goes on from a checkpoint, trains a few steps and saves after every second
one. Rounds alternate between the layouts and a plain file of the checkpoint's size, written by one process with fsync and read
back; numbers are medians. What is read has just been written: it comes from the page cache, for the plain file too.

Memory is that of a rank above what the run holds anyway: the resident high-water mark while saving or loading, minus what is
resident before the save or after the load. A share of 1 is all of the checkpoint's tensors.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import socket
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import multiprocessing

from benchmarks.runs import QUIET
from nlgmoe import ExpertParallelStrategy, GPTConfig, MoEConfig, MoEGPTModule
from nlgmoe.model.counting import count_parameters
from nlgmoe.versions import versions
from tests.synthetic import SyntheticData

ROOT = Path(__file__).parents[1]
SIZES = {
    "small": GPTConfig(8192, 128, 4, 256, 4, moe=MoEConfig(8, token_dropping=False)),
    "large": GPTConfig(8192, 128, 6, 512, 8, moe=MoEConfig(10, token_dropping=False)),
}
RANKS = {"one process": 1, "two ranks": 2}
STEPS = 6


class Meter(Callback):
    """Saves after every second step; times steps, saves and loads of one process, and the memory that the last two take."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, list[float]] = {"step": [], "save": [], "save_memory": []}
        self.load_seconds, self.load_peak = 0.0, 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Time what the strategy does to load."""
        for name in ("load_checkpoint", "load_model_state_dict", "load_optimizer_state_dict"):
            setattr(trainer.strategy, name, self._timed(getattr(trainer.strategy, name)))

    def _timed(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.load_peak:
                forget_peak()
            started = time.perf_counter()
            result = load(*args, **kwargs)
            self.load_seconds += time.perf_counter() - started
            self.load_peak = resident("VmHWM")
            return result

        return timed

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Loading is over."""
        if self.load_peak:
            self.found["load"] = [self.load_seconds]
            self.found["load_memory"] = [max(0, self.load_peak - resident("VmRSS"))]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it; save now and then."""
        self.found["step"].append(time.perf_counter() - self._started)
        if trainer.global_step % 2 == 0:
            before = resident("VmRSS")
            forget_peak()
            started = time.perf_counter()
            trainer.save_checkpoint(self.path)
            self.found["save"].append(time.perf_counter() - started)
            self.found["save_memory"].append(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of `VmRSS` (resident now, without what the allocator only keeps) or `VmHWM` (at most since `forget_peak`)."""
    if field == "VmRSS":
        ctypes.CDLL(None).malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Begin the high-water mark anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _worker(rank: int, port: int, size: str, ranks: int, path: str, output: str) -> None:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_RUN_ID"] = "benchmark"
    meter, exists = Meter(Path(path)), Path(path).exists()
    done = json.loads((Path(path) / "checkpoint.json").read_text())["global_step"] if exists else 0
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=ExpertParallelStrategy(2, expert_parallel_size=2) if ranks > 1 else "auto",
        max_steps=done + STEPS,
        callbacks=[meter],
        limit_val_batches=0,
        default_root_dir=output,
        **QUIET,
    )
    data = SyntheticData(8192, SIZES[size].seq_len, micro_batch_size=4 // ranks)
    trainer.fit(MoEGPTModule(SIZES[size]), data, ckpt_path=path if exists else None)
    Path(output, f"{rank}.json").write_text(json.dumps(meter.found))


def run(size: str, layout: str, folder: Path) -> dict[str, list[float]]:
    """What a child measured; of two ranks the larger number."""
    ranks, path = RANKS[layout], folder / f"{size} {layout}.ckpt"
    with tempfile.TemporaryDirectory() as output:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (port, size, ranks, str(path), output)
        multiprocessing.start_processes(_worker, arguments, nprocs=ranks, start_method="spawn")
        by_rank = [json.loads(Path(output, f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [max(values) for values in zip(*(r[name] for r in by_rank), strict=True)] for name in by_rank[0]}


def plain_file(folder: Path, size: int) -> dict[str, list[float]]:
    """Seconds to write `size` bytes with fsync, and to read them back into memory."""
    file, content = folder / "plain", os.urandom(1 << 24)
    started = time.perf_counter()
    with file.open("wb", buffering=0) as opened:
        for written in range(0, size, len(content)):
            opened.write(content[: size - written])
        os.fsync(opened.fileno())
    saved = time.perf_counter()
    buffer = memoryview(bytearray(size))
    begun = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        position = 0
        while position < size:
            position += opened.readinto(buffer[position:])
    loaded = time.perf_counter()
    file.unlink()
    return {"save": [saved - started], "load": [loaded - begun]}


def summarised(found: dict[str, list[float]], size: int) -> dict[str, float]:
    """Medians: MB/s, seconds, memory as a share of the tensors' bytes."""
    middle = {name: statistics.median(values) for name, values in found.items()}
    row = {"write_mb_per_s": size / 1e6 / middle["save"], "read_mb_per_s": size / 1e6 / middle["load"]}
    if "step" in middle:
        row |= {"step_seconds": middle["step"], "stall_seconds": middle["save"]}
        row |= {"save_memory": middle["save_memory"] / size, "load_memory": middle["load_memory"] / size}
    return row


def commit() -> str:
    """Of the sources, with `+` if they have been changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=3, help="times each layout is run, after once to have a checkpoint"
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="models")
    parser.add_argument("--folder", default=None, help="where the checkpoints go; the disk that is measured")
    parser.add_argument("--output", default=str(ROOT / "docs/results/checkpoint.json"), help="where the JSON goes")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"settings": {"rounds": arguments.rounds, "steps": STEPS, "threads": 1, "ranks": RANKS}}
    results |= {"commit": commit(), "versions": versions()}
    print(json.dumps(results["settings"] | {"commit": results["commit"]} | results["versions"]))
    columns = ["write_mb_per_s", "read_mb_per_s", "step_seconds", "stall_seconds", "save_memory", "load_memory"]
    print(f"{'':<30}" + "".join(f"{name:>16}" for name in [*columns, "disk / tensors"]))
    for size in arguments.sizes:
        tensors = 3 * 4 * count_parameters(SIZES[size]).total  # weights and two moments, fp32
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder, measured = Path(name), {layout: {} for layout in ("plain file", *RANKS)}
            for layout in RANKS:
                run(size, layout, folder)
            for _ in range(arguments.rounds):
                for layout, found in measured.items():
                    new = run(size, layout, folder) if layout in RANKS else plain_file(folder, tensors)
                    for key, values in new.items():
                        found.setdefault(key, []).extend(values)
            rows = {layout: summarised(found, tensors) for layout, found in measured.items()}
            for layout in RANKS:
                files = (folder / f"{size} {layout}.ckpt").iterdir()
                rows[layout]["disk_over_tensors"] = sum(file.stat().st_size for file in files) / tensors
        results[size] = {"tensor_bytes": tensors, **rows}
        for layout, row in rows.items():
            cells = [f"{row[key]:>16.4g}" if key in row else f"{'-':>16}" for key in [*columns, "disk_over_tensors"]]
            print(f"{size + ', ' + format(tensors / 1e6, '.0f') + ' MB, ' + layout:<30}" + "".join(cells), flush=True)
        Path(arguments.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
