"""`metrics.csv` and `expert_load.csv` of a run folder, as arrays."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nlgmoe.monitoring.table_file import number, read_rows

AFTER_STEP = ("val/", "train/flops", "time/elapsed")  # metrics of the state after the logged step
METRICS, LOADS = "metrics.csv", "expert_load.csv"


@dataclass(frozen=True)
class Series:
    """A metric over steps.

    Attributes:
        steps: `[N]` increasing; optimizer steps taken.
        values: `[N]`, may contain NaN and infinity.
    """

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def thinned(self, points: int) -> Series:
        """Reduce to at most `points` points by the means of neighbours, without values that are not finite."""
        bucket = -(-len(self) // max(1, points))
        if bucket <= 1:
            return self
        starts = np.arange(0, len(self), bucket)
        finite = np.isfinite(self.values)
        counts = np.add.reduceat(finite, starts)
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.add.reduceat(np.where(finite, self.values, 0.0), starts) / counts  # [ceil(N / bucket)]
        sizes = np.diff(np.append(starts, len(self)))
        return Series(np.add.reduceat(self.steps, starts) / sizes, values)


def read_metrics(path: Path) -> dict[str, Series]:
    """Read every column of `metrics.csv`; a missing file is empty. The last row of a step counts; damaged cells do not."""
    columns: dict[str, list[tuple[float, float]]] = {}
    for row in read_rows(path):
        step = number(row.get("step"))
        if step is None or not np.isfinite(step):
            continue
        for name, text in row.items():
            if name in ("step", "epoch") or (value := number(text)) is None:
                continue
            cell, rows = (step + name.startswith(AFTER_STEP), value), columns.setdefault(name, [])
            at = bisect_left(rows, (cell[0],))  # at the end, but for a callback's metric over something else than steps
            rows[at : at + (at < len(rows) and rows[at][0] == cell[0])] = [cell]
    return {name: Series(*(np.array(values) for values in zip(*rows, strict=True))) for name, rows in columns.items()}


def damaged_rows(path: Path) -> int:
    """Count rows of `metrics.csv` with missing, extra or non-numeric cells, which `read_metrics` skips."""
    return sum(
        None in row.values() or "" in row or any(text and number(text) is None for text in row.values())
        for row in read_rows(path)
    )


@dataclass(frozen=True)
class ExpertLoads:
    """Load of every expert over time.

    Attributes:
        steps: `[N]` steps taken at the end of each interval, increasing.
        requests: `[N, E]` for each layer, assignments per interval before dropping.
    """

    steps: np.ndarray
    requests: list[np.ndarray]

    def thinned(self, intervals: int) -> ExpertLoads:
        """Reduce to at most `intervals` intervals by adding neighbours."""
        bucket = -(-len(self.steps) // max(1, intervals))
        starts = np.arange(0, len(self.steps), bucket)
        ends = np.append(starts[1:], len(self.steps)) - 1
        return ExpertLoads(self.steps[ends], [np.add.reduceat(requests, starts) for requests in self.requests])


def read_expert_loads(path: Path) -> ExpertLoads | None:
    """Read `expert_load.csv`; None if it is empty. An incomplete row is discarded."""
    found: dict[int, dict[int, list[float]]] = {}
    experts: dict[int, int] = {}  # of each layer
    for row in read_rows(path):
        step, layer = number(row.get("step")), number(row.get("layer"))
        cells = [number(text) for name, text in row.items() if name and name.startswith("expert_")]
        counts = [cell for cell in cells if cell is not None]
        if step is None or layer is None or None in row.values() or not np.isfinite([step, layer, *counts]).all():
            continue
        if len(counts) != experts.setdefault(int(layer), len(counts)):  # an incomplete row
            continue
        found.setdefault(int(step), {})[int(layer)] = counts
    layers = max((len(interval) for interval in found.values()), default=0)
    whole = {step: interval for step, interval in found.items() if sorted(interval) == list(range(layers))}
    if not whole:
        return None
    requests = [np.array([interval[layer] for interval in whole.values()]) for layer in range(layers)]
    return ExpertLoads(np.array(list(whole), dtype=float) + 1, requests)
