"""Shared by the steps of `make gpu`: the device, and figures, which are judged and written to the results at once."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.documents import markdown_table
from nlgmoe.files import write_json

LISTED = ("H100", "H200")
"""Cards that the goals were set for; on others a speed is written down and not judged."""


class Results:
    """The results of a run in a JSON file, written after every figure.

    Args:
        path: of the file; None: nothing is written.
        about: a new run; None: what the file has.
    """

    def __init__(self, path: Path | None, about: dict[str, Any] | None = None) -> None:
        self.path = path
        self.run: dict[str, Any] = (
            json.loads(path.read_text()) if path and about is None else {**(about or {}), "steps": {}}
        )
        self.write()

    def step(self, name: str) -> dict[str, Any]:
        """Return a step; change it, then `write`."""
        step: dict[str, Any] = self.run["steps"].setdefault(name, {"status": "running", "figures": []})
        return step

    def write(self) -> None:
        """Write all steps."""
        if self.path is not None:
            write_json(self.path, self.run)

    def page(self) -> str:
        """Return all figures as a Markdown page."""
        rows = []
        for name, step in self.run["steps"].items():
            rows += [[name, f"**{step['status']}**", None, None, None]]
            for figure in step["figures"]:
                limits = ", ".join(
                    f"{key.replace('_', ' ')} {figure[key]:g}" for key in ("at_least", "at_most") if key in figure
                )
                value = figure["value"]
                shown = f"{value:.3g}" if isinstance(value, float) else json.dumps(value)
                met = {True: "yes", False: "**no**", None: "not judged" if limits else None}[figure["met"]]
                rows.append([name, figure["name"], shown, limits, met])
        origin = (
            f"`{self.run['command']}`, commit {self.run['commit']}, {self.run['card']}, driver {self.run['driver']}"
        )
        table = markdown_table(["step", "figure", "value", "limit", "met"], rows)
        return f"# Results on a GPU\n\n{origin}, PyTorch {self.run['torch']}, {self.run['started']}:\n\n{table}\n"


@dataclass(frozen=True)
class Run:
    """The device and the results of a step.

    Attributes:
        step: its name.
        device: of the models; the CPU in a dry run.
        dry: shapes are tiny, and figures that need a GPU are not measured.
        data: folder of the tokenised pocket Pile.
        results: get the figures.
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
        """The GPU's name; `cpu` in a dry run."""
        return "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def correct(self, name: str, value: float | None, at_most: float = 0.0) -> None:
        """Add a figure of correctness: a run that misses one fails. None where a dry run cannot measure it."""
        met = None if value is None and self.dry else within(value, at_most=at_most)
        self._add(kind="correct", name=name, value=value, met=met, at_most=at_most)

    def goal(self, name: str, value: float | None, **limits: float) -> None:
        """Add a figure of speed or memory, judged on the listed cards alone; missing it (`at_least`, `at_most`) fails nothing."""
        listed = any(card in self.card for card in LISTED)
        self._add(kind="goal", name=name, value=value, met=within(value, **limits) if listed else None, **limits)

    def note(self, name: str, value: Any) -> None:
        """Add a value that is not judged."""
        self._add(kind="note", name=name, value=value, met=None)

    def _add(self, **figure: Any) -> None:
        self.results.step(self.step)["figures"].append(figure)
        self.results.write()
        print(
            f"{self.step:<12} {figure['name']}: {figure['value']}{' MISSED' if figure['met'] is False else ''}",
            flush=True,
        )


def within(value: float | None, at_least: float = -math.inf, at_most: float = math.inf) -> bool:
    """Return True if a value is between its limits; NaN and None are not."""
    return value is not None and math.isfinite(value) and at_least <= value <= at_most


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
    """Return 1 if `work` waits for the device, and print where; 0 if not; None on a CPU."""
    work()  # libraries initialise at first use
    try:
        with sync_debug(device, "error"):
            work()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        traceback.print_exc()
        return 1
    return None if device.type == "cpu" else 0
