"""What all charts of a page share: colours, layout, and lines whose x axis the page can switch.

`page.js` finds in a trace's `meta` what it may do with it: `run` the number of its run, `clock` that its x are steps, to be shown
as tokens, FLOPs or time, `smooth` that its y are to be smoothed, `layer` of which MoE layer it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nlgmoe.tools.report.metrics import Series
from nlgmoe.tools.report.runs import Run

# Okabe and Ito's palette, which people with any colour vision tell apart; yellow left out, it is too light for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dot", "dash")  # once the colours are used up
GRID, INK = "#E4E7EB", "#1F2933"
# How many times a fair share something is: white 1, blue less, red more, black nothing at all. Even steps for doublings.
MOST = 4.0
RATIO_COLOURS = [
    (0.0, "#000000"),
    (1e-6, "#053061"),
    (0.25 / MOST, "#2166AC"),
    (0.5 / MOST, "#92C5DE"),
    (1.0 / MOST, "#F7F7F7"),
    (2.0 / MOST, "#F4A582"),
    (1.0, "#B2182B"),
]
POINTS = 30_000  # of all lines of a chart together: the page has to stay small
PANEL, GAP = 210, 80  # pixels: height of a panel, and between two


@dataclass(frozen=True)
class Chart:
    """A figure with its words.

    Attributes:
        name: in the page's address.
        title: with units.
        text: how to read it.
        figure: plotly's.
    """

    name: str
    title: str
    text: str
    figure: go.Figure


@dataclass(frozen=True)
class Panel:
    """A metric that gets a panel of its own.

    Attributes:
        metric: its name in `metrics.csv`; of a MoE layer's, what comes after `experts/LAYER/`.
        title: with units.
        log: a logarithmic y axis.
        zero: whether the y axis begins at 0.
        form: of the numbers on the y axis, as d3 writes it.
        smooth: whether the page's smoothing is for it.
    """

    metric: str
    title: str
    log: bool = False
    zero: bool = False
    form: str = ""
    smooth: bool = True


def colour_of(run: int) -> str:
    """Of a run, on every chart."""
    return PALETTE[run % len(PALETTE)]


def dash_of(run: int) -> str:
    """Of a run, on every chart."""
    return DASHES[run // len(PALETTE) % len(DASHES)]


def grid_of_panels(titles: Sequence[str], columns: int, panel: int = PANEL, between: float = 0.08) -> go.Figure:
    """An empty figure with a panel for each title, in rows of `columns`, `between` of the width between them."""
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
    return dressed(figure)


def dressed(figure: go.Figure) -> go.Figure:
    """In the page's style."""
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


def place(index: int, columns: int) -> dict[str, int]:
    """Row and column of a panel."""
    return {"row": index // columns + 1, "col": index % columns + 1}


def on_clock(figure: go.Figure) -> go.Figure:
    """Let the page write the title of every x axis."""
    axes = [name for name in figure.layout if name.startswith("xaxis")]
    figure.update_layout(meta={"clock": axes})
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
    """A metric of a run over its clock.

    Args:
        figure: gets it.
        run: its number.
        name: of the line, and of what it is switched on and off with in the legend.
        series: thinned.
        where: `row` and `col`.
        meta: what else `page.js` has to know.
        legend: whether the legend shows it.
        look: as of `go.Scatter`, in place of a line in the run's colour.
    """
    line = {"color": colour_of(run), "width": 1.8, "dash": dash_of(run)} | look.pop("line", {})
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
    """A panel for each metric that some run has, all runs in each; None if there is none."""
    panels = [panel for panel in panels if any(panel.metric in run.metrics for run in runs)]
    if not panels:
        return None
    columns = min(columns, len(panels))
    figure = grid_of_panels([panel.title for panel in panels], columns)
    points = POINTS // (len(panels) * len(runs))
    shown: set[int] = set()
    for index, panel in enumerate(panels):
        where = place(index, columns)
        for number, run in enumerate(runs):
            if panel.metric not in run.metrics:
                continue
            series = run.metrics[panel.metric].thinned(min(500, points))
            mode = "lines" if len(series) > 1 else "markers"
            meta = {"smooth": panel.smooth}
            add_line(figure, number, run.name, series, where, meta, number not in shown and len(runs) > 1, mode=mode)
            shown.add(number)
        scale_panel(figure, panel, where)
    return on_clock(figure)


def scale_panel(figure: go.Figure, panel: Panel, where: dict[str, int]) -> None:
    """The y axis that a panel asks for."""
    kind, mode = "log" if panel.log else "linear", "tozero" if panel.zero else "normal"
    figure.update_yaxes(tickformat=panel.form, type=kind, rangemode=mode, **where)


def rounded(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """Numbers with so many digits, to keep the page small; None where they are not finite."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]
