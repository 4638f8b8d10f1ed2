"""Shared parts of all charts: colours, layout, and lines whose x axis the page can switch.

`page.js` reads a trace's `meta`: `run` is the index of its run, `clock` is true if x is in steps and can be converted to
tokens, FLOPs or time, `smooth` is true if y is to be smoothed, `layer` is its MoE layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from nlgmoe.tools.report.metrics import Series
from nlgmoe.tools.report.runs import Run

# Okabe and Ito's colour-blind safe palette, without yellow, which is too light for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dot", "dash")  # when all colours are used
GRID, INK = "#E4E7EB", "#1F2933"
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
MAX_POINTS = 30_000  # of all lines of a chart together, to keep the page small
PANEL, GAP = 210, 80  # pixels: height of a panel, and between two


@dataclass(frozen=True)
class Chart:
    """A figure with its title and description.

    Attributes:
        name: anchor in the page.
        title: title, with units.
        text: description.
        figure: plotly figure.
    """

    name: str
    title: str
    text: str
    figure: go.Figure


@dataclass(frozen=True)
class Panel:
    """A metric with its own panel.

    Attributes:
        metric: name in `metrics.csv`, without `experts/LAYER/` for a metric of MoE layers.
        title: title, with units.
        log: use a logarithmic y axis.
        zero: start the y axis at 0.
        form: d3 format of the numbers on the y axis.
        smooth: apply the page's smoothing.
    """

    metric: str
    title: str
    log: bool = False
    zero: bool = False
    form: str = ""
    smooth: bool = True


def run_colour(run: int) -> str:
    """Return the colour of a run, the same in every chart."""
    return PALETTE[run % len(PALETTE)]


def band_colour(run: int) -> str:
    """Return the colour of a run's band of error: its own, at a fifth of the opacity."""
    return f"rgba{(*hex_to_rgb(run_colour(run)), 0.2)}"


def panel_grid(titles: Sequence[str], columns: int, panel: int = PANEL, between: float = 0.08) -> go.Figure:
    """Return an empty figure with a panel per title, in rows of `columns`, separated by `between` of the width."""
    columns = max(1, min(columns, len(titles)))
    rows = -(-len(titles) // columns)
    inner = rows * panel + (rows - 1) * GAP
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=titles,
        vertical_spacing=GAP / inner if rows > 1 else 0,
        horizontal_spacing=between,
    )
    figure.update_annotations(font_size=13)
    figure.update_layout(height=inner + 110)
    return apply_style(figure)


def apply_style(figure: go.Figure) -> go.Figure:
    """Apply the page's style."""
    figure.update_layout(
        template="none",
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK},
        margin={"l": 60, "r": 20, "t": 50, "b": 60},
        legend={"orientation": "h", "y": 1, "yref": "container", "yanchor": "top", "x": 0},
        hoverlabel={"namelength": -1},
        paper_bgcolor="white",
        plot_bgcolor="white",
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor="#9AA5B1", ticks="outside", tickcolor="#9AA5B1")
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True)
    return figure


def grid_cell(index: int, columns: int) -> dict[str, int]:
    """Return the row and column of a panel."""
    return {"row": index // columns + 1, "col": index % columns + 1}


def with_clock_axis(figure: go.Figure) -> go.Figure:
    """Mark all x axes as switchable; the page sets their titles."""
    figure.update_layout(meta={"clock": [name for name in figure.layout if name.startswith("xaxis")]})
    return figure


def add_line(
    figure: go.Figure,
    run: int,
    name: str,
    series: Series,
    where: dict[str, int],
    meta: dict[str, Any] | None = None,
    legend: bool = False,
    **look: Any,
) -> None:
    """Add a metric of a run over its steps.

    Args:
        figure: the figure.
        run: index of the run.
        name: name of the line and of its legend group.
        series: the thinned series.
        where: `row` and `col`.
        meta: further entries of `meta`.
        legend: show the line in the legend.
        look: arguments of `go.Scatter` that replace the default line.
    """
    dash = DASHES[run // len(PALETTE) % len(DASHES)]
    line = {"color": run_colour(run), "width": 1.8, "dash": dash} | look.pop("line", {})
    trace = go.Scatter(
        x=rounded(series.steps, 7),
        y=rounded(series.values),
        name=name,
        legendgroup=name,
        showlegend=legend,
        line=line,
        meta={"run": run, "clock": True, **(meta or {})},
        **({"mode": "lines", "hovertemplate": "%{y:.4~g}<br>at %{x:.3~s}"} | look),
    )
    figure.add_trace(trace, **where)


def metric_panels(runs: Sequence[Run], panels: Sequence[Panel], columns: int = 3) -> go.Figure | None:
    """Return a figure with a panel per metric that any run has, and a line per run; None without metrics."""
    panels = [panel for panel in panels if any(panel.metric in run.metrics for run in runs)]
    if not panels:
        return None
    columns = min(columns, len(panels))
    figure = panel_grid([panel.title for panel in panels], columns)
    points = MAX_POINTS // (len(panels) * len(runs))
    shown: set[int] = set()
    for index, panel in enumerate(panels):
        where = grid_cell(index, columns)
        for number, run in enumerate(runs):
            if panel.metric not in run.metrics:
                continue
            series = run.metrics[panel.metric].thinned(min(500, points))
            mode = "lines" if len(series) > 1 else "markers"
            meta = {"smooth": panel.smooth}
            add_line(figure, number, run.name, series, where, meta, number not in shown and len(runs) > 1, mode=mode)
            shown.add(number)
        scale_panel(figure, panel, where)
    return with_clock_axis(figure)


def scale_panel(figure: go.Figure, panel: Panel, where: dict[str, int]) -> None:
    """Format the y axis of a panel."""
    kind, mode = "log" if panel.log else "linear", "tozero" if panel.zero else "normal"
    figure.update_yaxes(tickformat=panel.form, type=kind, rangemode=mode, **where)


def rounded(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """Round to significant digits, to keep the page small; None replaces NaN and infinity."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]


def ratio_heat_map(ratio: np.ndarray, bar: bool) -> dict[str, Any]:
    """Return the arguments of a plotly heat map of ratios to the fair share, `[rows, columns]`; `bar` adds the colour bar."""
    return {
        "z": [[round(float(cell), 2) if np.isfinite(cell) else None for cell in row] for row in ratio],
        "colorscale": RATIO_COLOURS,
        "zmin": 0,
        "zmax": RATIO_MAX,
        "showscale": bar,
        "colorbar": {
            "title": "times a<br>fair share<br> ",
            "thickness": 14,
            "len": 220,
            "lenmode": "pixels",
            "y": 1,
            "yanchor": "top",
            "tickvals": [0, 0.5, 1, 2, 3, 4],
            "ticktext": ["0", "½", "1", "2", "3", "≥ 4"],
        },
    }
