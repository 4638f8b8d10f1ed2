"""`expert_load.csv`: how often every expert of every layer was asked for, over time."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nlgmoe.files import atomic_write


class LoadFile:
    """A row for each MoE layer and logging interval; written by one process, whole intervals at a time.

        step,tokens,layer,dropped,expert_0,expert_1,...

    `step` is that of `metrics.csv`, `tokens` the clock at its end, `layer` the number in `experts/LAYER/...`; then the share
    of assignments that were dropped, and how many asked for each expert, over all ranks, since the row before. Cells are
    empty where a layer has fewer experts.

    Args:
        folder: the run folder.
        experts: of each MoE layer.
        first_step: the first that is going to be logged: what a run wrote from there on, before it went on from a checkpoint, is
            dropped, and so is a row that was cut off.
    """

    NAME = "expert_load.csv"

    def __init__(self, folder: Path, experts: Sequence[int], first_step: int) -> None:
        self._path = folder / self.NAME
        self._width = max(experts)
        header = ["step", "tokens", "layer", "dropped", *(f"expert_{index}" for index in range(self._width))]
        kept = [",".join(header) + "\n", *_rows_before(self._path, first_step)]
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._path) as temporary:
            temporary.write_text("".join(kept))

    def write(self, step: int, tokens: int, loads: Sequence[np.ndarray], dropped: Sequence[float]) -> None:
        """Append an interval.

        Args:
            step: as the logger counts.
            tokens: the clock.
            loads: `[E]` of each layer.
            dropped: share of each layer's assignments.
        """
        rows = [
            [step, tokens, layer, f"{lost:.6g}", *(int(count) for count in load), *[""] * (self._width - len(load))]
            for layer, (load, lost) in enumerate(zip(loads, dropped, strict=True))
        ]
        with self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def _rows_before(path: Path, step: int) -> list[str]:
    """Whole lines of earlier steps, without the header."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)[1:]
    return [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) < step]
