"""Throughput, time of a step, and memory of a run."""

import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import distributed
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.device import is_accelerator, memory_bytes, product_name
from nlgmoe.hardware import peak_of
from nlgmoe.layers.precision import allows_tf32
from nlgmoe.lightning_state import ends_step, logs_this_step
from nlgmoe.module import MoEGPTModule
from nlgmoe.ranks import sum_over_ranks
from nlgmoe.validation import require


class Throughput(Callback):
    """Logs throughput, time of a step and memory once per logging interval (docs/report.md).

    `train/tokens_per_second`, `train/tflops_per_second` and `train/mfu` cover all ranks, `time/data` and `time/step` are means
    over ranks, in seconds per step, `memory/...` the maximum over ranks. Only `time/elapsed` includes validation and checkpoints.

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
            self._peak = peak_of(name, trainer.precision, allows_tf32())
        assert isinstance(pl_module, MoEGPTModule)
        self._begin_interval(pl_module)

    def _begin_interval(self, module: MoEGPTModule) -> None:
        self._tokens, self._flops = module.tokens_seen, module.clock.flops  # at the interval's start
        self._steps, self._seconds, self._waited = 0, 0.0, module.clock.seconds("data")

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
        if logs_this_step(trainer):
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: MoEGPTModule) -> None:
        device, started = trainer.strategy.root_device, time.perf_counter()
        if is_accelerator(device):
            torch.accelerator.synchronize(device)  # for the optimizer's step
        waited = module.clock.seconds("data") - self._waited
        total = waited + self._seconds + time.perf_counter() - started
        memory = memory_bytes(device)
        times, largest = _over_ranks(trainer, [waited / self._steps, total / self._steps], list(memory.values()))
        tokens, flops = module.tokens_seen - self._tokens, module.clock.flops - self._flops
        speed = flops / total
        metrics = {
            "train/tokens_per_second": tokens / total,
            "train/tflops_per_second": speed / 1e12,
            "train/flops": float(module.clock.flops),
            "time/data": times[0],
            "time/step": times[1],
            "time/elapsed": module.clock.seconds("run"),
            **{f"memory/{name}": value for name, value in zip(memory, largest, strict=True)},
        }
        if self._peak is not None:
            metrics["train/mfu"] = speed / trainer.world_size / self._peak
        module.log_dict(metrics)
        self._begin_interval(module)


def _over_ranks(trainer: Trainer, times: list[float], memory: list[int]) -> tuple[list[float], list[float]]:
    """Return the mean over ranks of `times` and the maximum of each value of `memory`."""
    device = trainer.strategy.root_device
    sums, largest = (torch.tensor(values, dtype=torch.float64, device=device) for values in (times, memory))
    if trainer.world_size > 1:
        sums = sum_over_ranks(sums)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return (sums / trainer.world_size).tolist(), largest.tolist()
