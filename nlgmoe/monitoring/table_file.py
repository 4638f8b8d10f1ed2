"""Read the tables of a run folder, `metrics.csv` and `expert_load.csv`, as far as they are intact."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path


def read_rows(path: Path) -> Iterator[Mapping[str, str | None]]:
    """Yield the rows; of a damaged file, those before the damage. A missing file has none.

    A cell that a row lacks is None; surplus cells are under the key `""`.
    """
    if path.is_file():
        with path.open(newline="", errors="replace") as file, suppress(csv.Error):
            yield from csv.DictReader(file, restkey="")


def number(cell: object) -> float | None:
    """Return the number in a cell; None if it holds none."""
    try:
        return float(cell) if isinstance(cell, str) and cell else None
    except ValueError:
        return None
