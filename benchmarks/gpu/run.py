"""What the steps of `make gpu` share: the device, and figures that are judged and written to the results as they come."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nlgmoe.files import write_json

ROOT = Path(__file__).parents[2]

LISTED = ("H100", "H200")
"""Cards that the aims were set for; on others a speed is written down and not judged."""

Kind = Literal["correct", "aim", "note"]


class Results:
    """A JSON file with a list of runs. The newest is the last, and is written after every figure.

    Args:
        path: of the file; it need not be there. None: nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = json.loads(path.read_text()) if path is not None and path.exists() else []

    def begin(self, about: dict[str, Any]) -> None:
        """Append a run."""
        self.runs.append(about | {"steps": {}})
        self.write()

    def step(self, name: str) -> dict[str, Any]:
        """The step of that name in the newest run; change it, then `write`."""
        found: dict[str, Any] = self.runs[-1]["steps"].setdefault(name, {"status": "running", "figures": []})
        return found

    def write(self) -> None:
        """Write all runs."""
        if self.path is not None:
            write_json(self.path, self.runs)


@dataclass(frozen=True)
class Run:
    """Where a step runs, and where its figures go.

    Attributes:
        step: its name.
        device: of the models; the CPU in a dry run.
        dry: shapes are tiny, and what only a GPU can show is not measured.
        data: folder of the tokenised pocket Pile.
        results: what the figures are written to.
    """

    step: str
    device: torch.device
    dry: bool
    data: Path
    results: Results

    @property
    def accelerator(self) -> str:
        """The trainer's name of the device."""
        return "cpu" if self.device.type == "cpu" else "gpu"

    @property
    def card(self) -> str:
        """What the GPU calls itself; `cpu` in a dry run."""
        return "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def correct(self, name: str, value: float | None, at_most: float = 0.0) -> None:
        """A figure of correctness: a run that misses one fails. None where a dry run cannot measure it."""
        self._add("correct", name, value, at_most=at_most)

    def aim(self, name: str, value: float | None, at_least: float | None = None, at_most: float | None = None) -> None:
        """A figure of speed or memory, judged on the listed cards alone; missing it fails nothing."""
        self._add("aim", name, value, at_least, at_most)

    def note(self, name: str, value: Any) -> None:
        """Anything else worth keeping."""
        self._add("note", name, value)

    def _add(
        self, kind: Kind, name: str, value: Any, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        met: bool | None = None
        if kind == "correct" or (kind == "aim" and any(card in self.card for card in LISTED)):
            met = None if value is None and self.dry else within(value, at_least, at_most)
        limits = {"at_least": at_least, "at_most": at_most}
        figure = {"kind": kind, "name": name, "value": value, "met": met}
        figure |= {side: limit for side, limit in limits.items() if limit is not None}
        self.results.step(self.step)["figures"].append(figure)
        self.results.write()
        print(describe(self.step, figure), flush=True)


def within(value: float | None, at_least: float | None, at_most: float | None) -> bool:
    """Whether a value is between its limits; NaN and None are not."""
    if value is None or not math.isfinite(value):
        return False
    return (at_least is None or value >= at_least) and (at_most is None or value <= at_most)


def describe(step: str, figure: dict[str, Any]) -> str:
    """A figure as a line."""
    value = figure["value"]
    shown = f"{value:.3g}" if isinstance(value, float) else json.dumps(value)
    sides = ("at_least", "at_most")
    limits = ", ".join(f"{side.replace('_', ' ')} {figure[side]:g}" for side in sides if side in figure)
    judged = {True: "ok", False: "MISSED", None: "not judged" if limits else ""}[figure["met"]]
    return f"{step:<12} {figure['name']:<58} {shown:>10}  {limits:<28} {judged}".rstrip()


def quiet_trainer(run: Run, folder: Path, **settings: Any) -> Any:
    """A `Trainer` of one device that prints and keeps nothing; `settings` are its own, and go before these."""
    from lightning import Trainer  # some steps do without it

    defaults: dict[str, Any] = {
        "accelerator": run.accelerator,
        "devices": 1,
        "max_epochs": -1,
        "gradient_clip_val": 1.0,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**defaults | settings)


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is expected; to 1 where that is 0."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / (expected.norm() or 1.0))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, run: Callable[[], object]) -> float:
    """How long `run` takes on the device."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


@contextmanager
def sync_debug(device: torch.device, mode: str) -> Iterator[None]:
    """Let operations that wait for the GPU fail (`error`) or warn (`warn`); on a CPU nothing waits."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(device: torch.device, work: Callable[[], object]) -> int | None:
    """1 if `work` waits for the device, and where is printed; 0 if not; None on a CPU."""
    try:
        with sync_debug(device, "error"):
            work()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        traceback.print_exc()
        return 1
    return None if device.type == "cpu" else 0


def draw(module: nn.Module, std: float = 0.02, seed: int = 0) -> None:
    """Random weights drawn where the module is: quick for billions of values, and other ones on every device."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=std, generator=generator)
        elif name.endswith("weight"):
            nn.init.ones_(parameter)
        else:
            nn.init.zeros_(parameter)
