"""Where the seconds of a training step go, without waiting for the device while it computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from torch import distributed
from typing_extensions import override

from nlgmoe.device import time_stamp

PARTS = ("data", "forward", "backward", "optimizer", "communication")
HOST = "data"  # of the parts, the one in which the host is waited for, not the GPU


class Stopwatch:
    """Adds up seconds by part. On a GPU it is the GPU's time between two points of its queue, read when `seconds` is called.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        self._spans: list[tuple[str, torch.Event, Any]] = []  # that the accelerator may not have reached yet

    def start(self, part: str) -> None:
        """The part begins."""
        self._begun[part] = time.perf_counter() if part == HOST else time_stamp(self._device)

    def stop(self, part: str) -> None:
        """It ends, if it has begun."""
        begun = self._begun.pop(part, None)
        if isinstance(begun, float):
            self._add(part, time.perf_counter() - begun)
        elif begun is not None:
            self._spans.append((part, begun, time_stamp(self._device)))

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """A part, as a context."""
        self.start(part)
        try:
            yield
        finally:
            self.stop(part)

    def seconds(self) -> dict[str, float]:
        """Of each part since the last call; waits for the GPU."""
        for part, begin, end in self._spans:
            end.synchronize()
            self._add(part, begin.elapsed_time(end) / 1e3)
        self._spans.clear()
        found, self._seconds = self._seconds, {}
        return found

    def _add(self, part: str, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds


class TimedLoop(Profiler):
    """Lightning tells its profiler when anything begins and ends; this one times the parts of a step, and passes all of it on.

    Args:
        profiler: the trainer's own.
        stopwatch: of the parts; `batch` is the whole of a micro-batch, with the optimizer's step.
    """

    def __init__(self, profiler: Profiler, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.profiler, self._stopwatch = profiler, stopwatch

    @override
    def start(self, action_name: str) -> None:
        """An action begins."""
        self.profiler.start(action_name)
        if (part := _part_of(action_name)) is not None:
            self._stopwatch.start(part)

    @override
    def stop(self, action_name: str) -> None:
        """It ends."""
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


COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter_tensor",
)


class TimedCollectives:
    """Times what this rank spends in collectives of `torch.distributed`, DeepSpeed's included, between `begin` and `end`.

    It is the time that nothing hides: until a collective, or the wait for one that ran beside something else, returns; on a
    GPU, until its queue goes on. `ddp` reduces gradients in C++, within the backward pass, where nobody sees it from here.

    Args:
        stopwatch: of the part `communication`.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._originals: dict[str, Any] = {}

    def begin(self) -> None:
        """Take the functions' places."""
        for name in COLLECTIVES:
            self._originals[name] = original = getattr(distributed, name)
            setattr(distributed, name, self._timed(original))

    def end(self) -> None:
        """Give them back."""
        for name, original in self._originals.items():
            setattr(distributed, name, original)
        self._originals.clear()

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._stopwatch.of("communication"):
                work = collective(*args, **kwargs)
            return work if work is None else _TimedWork(work, self._stopwatch)

        return timed


class _TimedWork:
    """A collective under way."""

    def __init__(self, work: Any, stopwatch: Stopwatch) -> None:
        self._work, self._stopwatch = work, stopwatch

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._stopwatch.of("communication"):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
