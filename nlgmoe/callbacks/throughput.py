"""How fast a run is, what its time goes to, and the memory that it takes."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.device import product_name
from nlgmoe.model.counting import flops_per_token
from nlgmoe.module import MoEGPTModule
from nlgmoe.monitoring.hardware import peak_of
from nlgmoe.monitoring.logging_step import ends_step, is_logged, sum_over_ranks
from nlgmoe.monitoring.memory import MEMORY, memory_bytes
from nlgmoe.monitoring.stopwatch import PARTS, Stopwatch, TimedCollectives, TimedLoop


class Throughput(Callback):
    """Logs, per logging interval, the speed of all ranks together (`train/tokens_per_second`, `train/tflops_per_second`,
    `train/mfu`), the seconds of a step by part (`time/...`, mean over ranks), and memory (`memory/...`, largest of all ranks).
    docs/metrics.md says what each of them counts. Validation and checkpoints are in `time/elapsed` alone.

    FLOPs are the model's, by arithmetic (`model/counting.py`): what a token passes through, forward and backward, at the
    length of its sequence, dropped or not; not what is computed again, nor what a teacher computes.

    Args:
        peak_tflops: what one device can do at best, in TFLOPs a second, for `train/mfu`; null: what the data sheet of its GPU
            says, where it is known. Without a peak there is no `train/mfu`.

    Raises:
        ValueError: `peak_tflops` is not above 0.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"peak_tflops={peak_tflops} must be above 0, or null")
        self.peak_tflops = peak_tflops
        self._peak: float | None = None  # FLOP/s of one device
        self._flops = self._step_flops = 0  # since the run began, up to the last step; of the step at hand
        self._elapsed, self._fit_started = 0.0, 0.0  # seconds: before this start; the clock at it
        self._begin_interval()
        self._before, self._started = 0, 0.0

    def _begin_interval(self) -> None:
        self._tokens = self._steps = 0
        self._interval_flops, self._seconds = 0, 0.0

    @override
    def state_dict(self) -> dict[str, Any]:
        """What counts from the beginning of the run."""
        return {"flops": self._flops, "elapsed": self._elapsed_so_far()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._flops, self._elapsed = state_dict["flops"], state_dict["elapsed"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        device = trainer.strategy.root_device
        self._peak = 1e12 * self.peak_tflops if self.peak_tflops else peak_flops(device, trainer.precision)
        self._stopwatch = Stopwatch(device)
        self._collectives = TimedCollectives(self._stopwatch)
        self._watches = bool(trainer.log_every_n_steps)  # type: ignore[attr-defined]  # nobody would read it otherwise
        if self._watches:
            trainer.profiler = TimedLoop(trainer.profiler, self._stopwatch)  # type: ignore[attr-defined]
        self._fit_started = time.perf_counter()
        self._step_flops = 0
        self._begin_interval()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """A micro-batch begins."""
        assert isinstance(pl_module, MoEGPTModule)
        self._before = pl_module.tokens_fed
        self._started = time.perf_counter()
        if trainer.world_size > 1 and self._watches:
            self._collectives.begin()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """It ends; log once per interval."""
        assert isinstance(pl_module, MoEGPTModule)
        self._collectives.end()
        self._seconds += time.perf_counter() - self._started
        tokens = pl_module.tokens_fed - self._before
        self._tokens += tokens
        length = tokens // (trainer.world_size * batch["tokens"].shape[0])  # a curriculum has cut them
        self._step_flops += tokens * flops_per_token(pl_module.config, length)
        if not ends_step(trainer):
            return
        self._steps += 1
        self._flops += self._step_flops
        self._interval_flops += self._step_flops
        self._step_flops = 0
        if is_logged(trainer):
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: MoEGPTModule) -> None:
        seconds = self._stopwatch.seconds()
        data = seconds.get("data", 0.0)
        total = data + self._seconds
        seconds["optimizer"] = seconds.get("batch", 0.0) - seconds.get("forward", 0.0) - seconds.get("backward", 0.0)
        parts = [seconds.get(part, 0.0) / self._steps for part in PARTS] + [total / self._steps]
        memory = memory_bytes(trainer.strategy.root_device)
        times, most = _over_ranks(trainer, parts, list(memory.values()))
        speed = self._interval_flops / total
        metrics = {
            "train/tokens_per_second": self._tokens / total,
            "train/tflops_per_second": speed / 1e12,
            "train/flops": float(self._flops),
            **{f"time/{part}": value for part, value in zip((*PARTS, "step"), times, strict=True)},
            "time/elapsed": self._elapsed_so_far(),
            **{f"memory/{name}": value for name, value in zip(memory, most, strict=True)},
        }
        if self._peak is not None:
            metrics["train/mfu"] = speed / trainer.world_size / self._peak
        module.log_dict(metrics)
        self._begin_interval()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clocks."""
        self._stop(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end: a micro-batch may be under way."""
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        self._elapsed, self._fit_started = self._elapsed_so_far(), 0.0
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if isinstance(profiler, TimedLoop):
            self._collectives.end()
            trainer.profiler = profiler.profiler  # type: ignore[attr-defined]

    def _elapsed_so_far(self) -> float:
        return self._elapsed + (time.perf_counter() - self._fit_started if self._fit_started else 0.0)

    def logged_names(self, trainer: Trainer, module: MoEGPTModule) -> set[str]:
        """All that it logs, once training has started."""
        names = {"train/tokens_per_second", "train/tflops_per_second", "train/flops"}
        names |= {f"time/{part}" for part in (*PARTS, "step", "elapsed")}
        names |= {f"memory/{name}" for name in MEMORY[: len(memory_bytes(trainer.strategy.root_device))]}
        return names | {"train/mfu"} if self._peak is not None else names


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a GPU's data sheet promises for a run's matrix products; None if nothing is known of it.

    Args:
        device: the run's.
        precision: as Lightning writes it, such as `bf16-mixed`. fp32 counts as TF32 where PyTorch is told to use that.
    """
    name = product_name(device)
    return None if name is None else peak_of(name, precision, torch.get_float32_matmul_precision() != "highest")


def _over_ranks(trainer: Trainer, times: list[float], memory: list[int]) -> tuple[list[float], list[float]]:
    """Mean over ranks of `times`, and the largest of each number of `memory`: one sum, where each rank has places of its own."""
    ranks, count = trainer.world_size, len(memory)
    if ranks == 1:
        return times, [float(value) for value in memory]
    table = torch.zeros(len(times) + ranks * count, dtype=torch.float64)
    table[: len(times)] = torch.tensor(times, dtype=torch.float64) / ranks
    first = len(times) + trainer.global_rank * count
    table[first : first + count] = torch.tensor(memory, dtype=torch.float64)
    total = sum_over_ranks(table.to(trainer.strategy.root_device)).cpu()
    return total[: len(times)].tolist(), total[len(times) :].view(ranks, count).amax(dim=0).tolist()
