"""Parts of all charts. A panel is a plotly figure, `traces` and `layout`, which `page.js` completes with the page's style.

`page.js` reads a trace's `meta`: `run` is the key of its run or group; `clock` is true if x is in steps and can be converted to
tokens, FLOPs or time; `smooth` is true if y is to be smoothed; `layer` is its MoE layer; `curves` is `groups` for the mean of a
group and `runs` for a run, of which the page shows either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from nlgmoe.tools.report.runs import PALETTE, Run

Trace = dict[str, Any]
DASHES = ("solid", "dot", "dash")  # of lines, when all colours are used
# Ratio to the fair share (uniform load): white 1, blue less, red more, black 0; equal steps for doublings.
RATIO_MAX = 4.0
RATIO_COLOURS = [
    (0.0, "#000000"),
    (1e-6, "#053061"),
    (0.25 / RATIO_MAX, "#2166AC"),
    (0.5 / RATIO_MAX, "#92C5DE"),
    (1.0 / RATIO_MAX, "#F7F7F7"),
    (2.0 / RATIO_MAX, "#F4A582"),
    (1.0, "#B2182B"),
]
HOVER = "%{y:.4~g}<br>at %{x:.3~s}"  # plotly's template of the text beside the pointer
MAX_POINTS = 30_000  # of all lines of a chart together, to keep the page small


@dataclass(frozen=True)
class Panel:
    """A plotly figure with a title."""

    title: str
    traces: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)  # as far as it differs from the page's
    height: int = 240  # pixels


@dataclass(frozen=True)
class Chart:
    """Panels with a title and a description."""

    name: str  # anchor in the page
    title: str
    text: str
    panels: list[Panel]
    width: int = 320  # least width of a panel in pixels; as many stand in a row as fit


def points_of(lines: int) -> int:
    """Return the number of points of each line of a chart."""
    return max(20, min(1000, MAX_POINTS // max(1, lines)))


def line(run: Run, series: pd.Series, points: int, meta: dict[str, Any] | None = None, **changes: Any) -> Trace:
    """Return a metric of a run over its steps, of at most `points` points; `changes` replace properties of the trace."""
    series = thinned(series, points)
    dash = DASHES[int(run.key.removeprefix("group")) // len(PALETTE) % len(DASHES)]
    curves = "groups" if run.is_group else "runs"
    return {
        "type": "scatter",
        "mode": "lines" if len(series) > 1 else "markers",
        "x": rounded(series.index, 7),
        "y": rounded(series),
        "name": run.name,
        "line": {"color": run.colour, "width": 1.8, "dash": dash} | changes.pop("line", {}),
        "marker": {"color": run.colour} | changes.pop("marker", {}),
        "meta": {"run": run.key, "clock": True, "curves": curves, **(meta or {})},
        "hovertemplate": HOVER,
        **changes,
    }


def thinned(series: pd.Series, points: int) -> pd.Series:
    """Reduce to at most `points` points by the means of neighbours, without values that are not finite."""
    bucket = -(-len(series) // points)
    if bucket <= 1:
        return series
    rows = pd.DataFrame({"step": series.index, "value": series.where(np.isfinite(series)).to_numpy()})
    return rows.groupby(rows.index // bucket).mean().set_index("step")["value"]


def rounded(values: Iterable[float], digits: int = 5) -> list[float | None]:
    """Round to significant digits, to keep the page small; None replaces NaN and infinity."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]


def ratio_heat_map(ratio: np.ndarray) -> Trace:
    """Return a heat map of ratios to the fair share, `[rows, columns]`."""
    return {
        "type": "heatmap",
        "z": [rounded(row, 3) for row in ratio],
        "colorscale": RATIO_COLOURS,
        "zmin": 0,
        "zmax": RATIO_MAX,
        "colorbar": {"thickness": 8, "tickvals": [0, 1, 2, 4], "ticktext": ["0", "1", "2", "≥ 4"], "outlinewidth": 0},
    }
