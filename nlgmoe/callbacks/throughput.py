"""Throughput, step time by part, and memory of a run."""

import time
from collections import defaultdict
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.device import memory_bytes, product_name, time_stamp
from nlgmoe.hardware import peak_of
from nlgmoe.module import MoEGPTModule
from nlgmoe.ranks import sum_over_ranks
from nlgmoe.run.folder import is_logged
from nlgmoe.run.resume import ends_step
from nlgmoe.validation import require

PARTS = ("data", "forward", "backward", "optimizer")
HOST = "data"  # the part that is timed on the host, not on the GPU


class Throughput(Callback):
    """Logs throughput, step time by part and memory once per logging interval (docs/metrics.md).

    `train/tokens_per_second`, `train/tflops_per_second` and `train/mfu` cover all ranks, `time/...` is the mean over ranks of
    seconds per step, `memory/...` the maximum over ranks. Only `time/elapsed` includes validation and checkpoints.

    FLOPs are computed from the configuration (`model/counting.py`): forward and backward pass of every token at its sequence
    length, dropped or not, frozen or not, without recomputation and without a teacher.

    Args:
        peak_tflops: peak TFLOPs per second of one device, for `train/mfu`; null: the data sheet's value. If it is
            unknown, `train/mfu` is not logged.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        require(peak_tflops is None or peak_tflops > 0, f"peak_tflops={peak_tflops} must be above 0, or null")
        self.peak_tflops = peak_tflops
        self._peak: float | None = None  # FLOP/s of one device

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        if self.peak_tflops is not None:
            self._peak = 1e12 * self.peak_tflops
        elif (name := product_name(device)) is not None:
            self._peak = peak_of(name, trainer.precision, torch.get_float32_matmul_precision() != "highest")
        self._stopwatch = Stopwatch(device)
        self._is_timed = bool(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self._is_timed:
            trainer.profiler = StepProfiler(trainer.profiler, self._stopwatch)  # type: ignore[attr-defined]
        assert isinstance(pl_module, MoEGPTModule)
        self._begin_interval(pl_module)

    def _begin_interval(self, module: MoEGPTModule) -> None:
        self._tokens, self._flops = module.tokens_seen, module.clock.flops  # at the interval's start
        self._steps, self._seconds = 0, 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._batch_started = time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, MoEGPTModule)
        self._seconds += time.perf_counter() - self._batch_started
        if not ends_step(trainer):
            return
        self._steps += 1
        if is_logged(trainer):
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: MoEGPTModule) -> None:
        started = time.perf_counter()
        seconds = self._stopwatch.seconds()
        data, waited = seconds.get("data", 0.0), time.perf_counter() - started  # on a GPU, for the optimizer's step
        total = data + self._seconds + waited
        seconds["optimizer"] = seconds.get("batch", 0.0) - seconds.get("forward", 0.0) - seconds.get("backward", 0.0)
        parts = [seconds.get(part, 0.0) / self._steps for part in PARTS] + [total / self._steps]
        memory = memory_bytes(trainer.strategy.root_device)
        times, largest = _over_ranks(trainer, parts, list(memory.values()))
        tokens, flops = module.tokens_seen - self._tokens, module.clock.flops - self._flops
        speed = flops / total
        metrics = {
            "train/tokens_per_second": tokens / total,
            "train/tflops_per_second": speed / 1e12,
            "train/flops": float(module.clock.flops),
            **{f"time/{part}": value for part, value in zip((*PARTS, "step"), times, strict=True)},
            "time/elapsed": module.clock.seconds("run"),
            **{f"memory/{name}": value for name, value in zip(memory, largest, strict=True)},
        }
        if self._peak is not None:
            metrics["train/mfu"] = speed / trainer.world_size / self._peak
        module.log_dict(metrics)
        self._begin_interval(module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if isinstance(profiler, StepProfiler):
            trainer.profiler = profiler.profiler  # type: ignore[attr-defined]


def _over_ranks(trainer: Trainer, times: list[float], memory: list[int]) -> tuple[list[float], list[float]]:
    """Return the mean over ranks of `times` and the maximum of each value of `memory`, in one all-reduce."""
    ranks, count = trainer.world_size, len(memory)
    if ranks == 1:
        return times, [float(value) for value in memory]
    table = torch.zeros(len(times) + ranks * count, dtype=torch.float64)  # each rank's memory has its own cells
    table[: len(times)] = torch.tensor(times, dtype=torch.float64) / ranks
    first = len(times) + trainer.global_rank * count
    table[first : first + count] = torch.tensor(memory, dtype=torch.float64)
    total = sum_over_ranks(table.to(trainer.strategy.root_device)).cpu()
    return total[: len(times)].tolist(), total[len(times) :].view(ranks, count).amax(dim=0).tolist()


class Stopwatch:
    """Sums seconds by part. On a GPU, time is measured between events in its queue and read by `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started: dict[str, Any] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._spans: list[tuple[str, torch.Event, Any]] = []  # events that the accelerator may not have reached yet

    def start(self, part: str) -> None:
        """Start a part."""
        self._started[part] = time.perf_counter() if part == HOST else time_stamp(self._device)

    def stop(self, part: str) -> None:
        """Stop a part, if it was started."""
        started = self._started.pop(part, None)
        if isinstance(started, float):
            self._seconds[part] += time.perf_counter() - started
        elif started is not None:
            self._spans.append((part, started, time_stamp(self._device)))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part since the last call; waits for the GPU."""
        for part, begin, end in self._spans:
            end.synchronize()
            self._seconds[part] += begin.elapsed_time(end) / 1e3
        self._spans.clear()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


class StepProfiler(Profiler):
    """Times the parts of a step from Lightning's profiler calls, and forwards the calls to another profiler.

    Args:
        stopwatch: gets the parts; `batch` is a whole micro-batch, with the optimizer's step.
    """

    def __init__(self, profiler: Profiler, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.profiler, self._stopwatch = profiler, stopwatch

    @override
    def start(self, action_name: str) -> None:
        self.profiler.start(action_name)
        if (part := _part_of(action_name)) is not None:
            self._stopwatch.start(part)

    @override
    def stop(self, action_name: str) -> None:
        if (part := _part_of(action_name)) is not None:
            self._stopwatch.stop(part)
        self.profiler.stop(action_name)


def _part_of(action: str) -> str | None:
    if action == "run_training_batch":
        return "batch"
    if action.endswith(".train_dataloader_next"):
        return "data"
    if action.startswith("[Strategy]"):
        name = action.rpartition(".")[2]
        return {"training_step": "forward", "backward": "backward"}.get(name)
    return None
