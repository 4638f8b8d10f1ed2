"""`metrics.csv` and `expert_load.csv` of a run folder, as arrays."""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from nlgmoe.monitoring.table_file import number, read_rows
from nlgmoe.resuming.branches import Start

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


def read_metrics(path: Path, starts: Sequence[Start] = ()) -> dict[str, Series]:
    """Read every column of `metrics.csv`; a missing file is empty.

    The last row of a step counts. Where a resumed run goes back, all earlier rows of later steps are discarded, also of columns
    that it does not log any more; where it returns to the checkpoint of an earlier start, that one's rows count again. An
    incomplete row is discarded.

    Args:
        path: the file.
        starts: of the run; without them, or their rows, the first row of a resumed run, at the end of an interval, says where it
            goes back to.
    """
    columns: dict[str, list[tuple[float, float]]] = {}
    branches: dict[int, dict[str, list[tuple[float, float]]]] = {}  # columns at the end of starts that are returned to

    def keep(steps: float) -> dict[str, list[tuple[float, float]]]:
        """Return the rows of the first `steps` steps."""
        kept = {
            name: rows[: bisect_left(rows, (steps + name.startswith(AFTER_STEP),))] for name, rows in columns.items()
        }
        return {name: rows for name, rows in kept.items() if rows}

    began: dict[int, list[int]] = {}  # starts by the rows before them
    fewest = sys.maxsize  # fewer before a later start: the file of the earlier rows is gone
    for at in range(len(starts) - 1, 0, -1):
        if (rows_before := starts[at].rows) is not None:
            fewest = min(fewest, rows_before)
            began.setdefault(fewest, []).insert(0, at)
    returned_to = {start.parent for at, start in enumerate(starts) if start.parent != at - 1}
    recorded = bool(starts) and all(start.rows is not None for start in starts)
    latest = 0
    for index, row in enumerate(chain(read_rows(path), [{}])):  # a start may have logged nothing yet
        if starts and starts[0].forked and starts[0].rows == index:
            columns = {}  # those before are of forks that took no step, perhaps of other runs
        before = columns
        for at in began.get(index, ()):
            if latest in returned_to:
                branches[latest] = columns
            parent = starts[at].parent
            if parent != latest:
                columns = before if parent is None else branches.get(parent, before)
            columns, latest = keep(starts[at].step), at
        step = number(row.get("step"))
        if step is None or not np.isfinite(step):
            continue
        cells = {
            name: (step + name.startswith(AFTER_STEP), value)
            for name, text in row.items()
            if (value := number(text)) is not None and name not in ("step", "epoch")
        }
        if not recorded and any(name in columns and columns[name][-1][0] > taken for name, (taken, _) in cells.items()):
            columns = keep(step + 1)
        for name, cell in cells.items():
            rows = columns.setdefault(name, [])
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


def read_expert_loads(path: Path, end: float = math.inf) -> ExpertLoads | None:
    """Read `expert_load.csv`, with repeated steps and incomplete rows as in `read_metrics`; None if it is empty.

    Args:
        path: the file.
        end: step from which rows are of a branch that the run has left, and that only a start which trains removes.
    """
    found: dict[int, dict[int, list[float]]] = {}
    experts: dict[int, int] = {}  # of each layer
    for row in read_rows(path):
        step, layer = number(row.get("step")), number(row.get("layer"))
        cells = [number(text) for name, text in row.items() if name and name.startswith("expert_")]
        counts = [cell for cell in cells if cell is not None]
        if step is None or layer is None or None in row.values() or not np.isfinite([step, layer, *counts]).all():
            continue
        if step >= end:
            break
        if len(counts) != experts.setdefault(int(layer), len(counts)):  # an incomplete row
            continue
        for later in [known for known in found if known > step or (known == step and int(layer) in found[known])]:
            del found[later]
        found.setdefault(int(step), {})[int(layer)] = counts
    layers = max((len(interval) for interval in found.values()), default=0)
    whole = {step: interval for step, interval in found.items() if sorted(interval) == list(range(layers))}
    if not whole:
        return None
    requests = [np.array([interval[layer] for interval in whole.values()]) for layer in range(layers)]
    return ExpertLoads(np.array(list(whole), dtype=float) + 1, requests)
