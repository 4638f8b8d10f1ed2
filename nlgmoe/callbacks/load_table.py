"""`expert_load.csv`: assignments to each expert over time. A long run writes fewer rows: they thin out with the steps taken."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nlgmoe.run.folder import cut_rows

ROWS_PER_DOUBLING = 128


def has_row(interval: int) -> bool:
    """Return True if the table has a row for a logging interval: a rule of the step alone, which restarts do not change.

    All of the first 256 intervals have one, every second of the next 256, every fourth of the next 512, and so on.

    Args:
        interval: logging intervals that the run has had with this one.
    """
    # The largest power of 2 up to interval / 128.
    spacing = 1 << max(0, (interval // ROWS_PER_DOUBLING).bit_length() - 1)
    return interval % spacing == 0


class LoadTable:
    """The file, on the process that writes it.

    Args:
        path: the file; a new one begins with the header.
        rows: of the checkpoint that is resumed; later rows are cut. None: the checkpoint does not count them, and all are kept.

    Attributes:
        rows: number of rows, without the header.
    """

    def __init__(self, path: Path, rows: int | None) -> None:
        self.path, self.rows = path, cut_rows(path, rows)

    def append(self, step: int, tokens: int, loads: Sequence[np.ndarray], dropped: Sequence[float]) -> None:
        """Append a row for each MoE layer; cells are empty where a layer has fewer experts.

            step,tokens,moe_layer,dropped,expert_0,expert_1,...

        Args:
            step: the step of `metrics.csv`.
            tokens: tokens seen after the step.
            loads: `[E]` for each layer: assignments since the last row, before dropping, over all ranks.
            dropped: fraction of each layer's assignments.
        """
        width = max(map(len, loads))
        rows: list[list[object]] = []
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows.append(["step", "tokens", "moe_layer", "dropped", *(f"expert_{index}" for index in range(width))])
            self.rows = 0
        for moe_layer, (load, share) in enumerate(zip(loads, dropped, strict=True)):
            cells = [*(int(count) for count in load), *[""] * (width - len(load))]
            rows.append([step, tokens, moe_layer, f"{share:.6g}", *cells])
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        self.rows += len(loads)
