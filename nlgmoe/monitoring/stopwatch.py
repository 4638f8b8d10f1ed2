"""Time of a training step by part, measured without synchronising with the device."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from typing_extensions import override

from nlgmoe.device import time_stamp

PARTS = ("data", "forward", "backward", "optimizer")
HOST = "data"  # the part that is timed on the host, not on the GPU


class Stopwatch:
    """Sums seconds by part. On a GPU, time is measured between events in its queue and read by `seconds`.

    Args:
        device: the device that computes.
    """

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
        profiler: the trainer's own profiler.
        stopwatch: gets the parts; `batch` is a whole micro-batch, with the optimizer's step.
    """

    def __init__(self, profiler: Profiler, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.profiler, self._stopwatch = profiler, stopwatch

    @override
    def start(self, action_name: str) -> None:
        """Start an action."""
        self.profiler.start(action_name)
        if (part := _part_of(action_name)) is not None:
            self._stopwatch.start(part)

    @override
    def stop(self, action_name: str) -> None:
        """Stop an action."""
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
