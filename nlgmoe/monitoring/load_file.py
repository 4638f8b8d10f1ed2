"""`expert_load.csv`: the load of every expert of every layer over time."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nlgmoe.files import atomic_write


class ExpertLoadFile:
    """Writes a row for each MoE layer and logging interval, from one process.

        step,tokens,layer,dropped,expert_0,expert_1,...

    `step` is the step of `metrics.csv`, `tokens` the tokens seen after it, `layer` the number in `experts/LAYER/...`,
    `dropped` the fraction of dropped assignments, `expert_I` the assignments to an expert before dropping, over all ranks,
    since the previous row. Cells are empty where a layer has fewer experts.

    Args:
        folder: the run folder.
        experts: number of experts of each MoE layer.
        first_step: the first step that will be logged; existing rows from this step on (a resumed run repeats them) and an
            incomplete last row are discarded.
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
            step: the logger's step.
            tokens: tokens seen.
            loads: `[E]` for each layer.
            dropped: fraction of each layer's assignments.
        """
        rows = [
            [step, tokens, layer, f"{share:.6g}", *(int(count) for count in load), *[""] * (self._width - len(load))]
            for layer, (load, share) in enumerate(zip(loads, dropped, strict=True))
        ]
        with self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def _rows_before(path: Path, step: int) -> list[str]:
    """Return complete lines of earlier steps, without the header."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)[1:]
    return [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) < step]
