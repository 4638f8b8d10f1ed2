"""Charts of the routers: who works, over time, and how sure the gates are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from nlgmoe.tools.report.drawing import (
    MOST,
    POINTS,
    RATIO_COLOURS,
    Chart,
    Panel,
    add_line,
    grid_of_panels,
    on_clock,
    place,
    scale_panel,
)
from nlgmoe.tools.report.metrics import Series
from nlgmoe.tools.report.runs import Run

CELLS = 60_000  # of all heat maps of a run together
PANELS = (
    Panel("dropped", "Dropped assignments (share)", zero=True, form=".0%"),
    Panel("dead", "Dead experts (number)", zero=True, smooth=False),
    Panel("load_max_over_mean", "Busiest expert's load (times a fair share)", zero=True),
    Panel("load_min_over_mean", "Idlest expert's load (times a fair share)", zero=True),
    Panel("load_cv", "Load imbalance (coefficient of variation)", zero=True),
    Panel("entropy", "Gate entropy (share of its maximum)"),
    Panel("confidence", "Gate's probability of the experts chosen"),
    Panel("logit_rms", "Router logits (root mean square)"),
    Panel("expert_share", "Weight of experts beside the shared MLP"),
    Panel("grad_norm_router", "Gradient norm of routers", log=True),
    Panel("grad_norm_experts", "Gradient norm of experts", log=True),
)
_NAME = re.compile(r"experts/(\d+)/(\w+)")


def layers_of(run: Run) -> list[int]:
    """MoE layers that it logged anything of."""
    return sorted({int(match[1]) for name in run.metrics if (match := _NAME.fullmatch(name))})


def router(runs: Sequence[Run]) -> Chart | None:
    """A panel for each statistic of the routers; which layers are shown, the page switches."""
    layers = {number: layers_of(run) for number, run in enumerate(runs)}
    panels = [
        panel
        for panel in PANELS
        if any(f"experts/{layer}/{panel.metric}" in runs[run].metrics for run in layers for layer in layers[run])
    ]
    if not panels:
        return None
    columns = min(3, len(panels))
    figure = grid_of_panels([panel.title for panel in panels], columns)
    points = min(300, POINTS // (len(panels) * sum(len(found) + 1 for found in layers.values())))
    alone, shown = len(runs) == 1, set()
    for index, panel in enumerate(panels):
        where = place(index, columns)
        for number, run in enumerate(runs):
            found = {layer: run.metrics.get(f"experts/{layer}/{panel.metric}") for layer in layers[number]}
            lines: dict[int | str, Series] = {
                layer: series.thinned(max(20, points)) for layer, series in found.items() if series is not None
            }
            if (mean := _mean(list(lines.values()))) is not None:
                lines["mean"] = mean
            for layer, values in lines.items():
                look: dict[str, Any]
                if layer == "mean":
                    name, look = f"{run.name}: mean of layers", {"line": {"width": 2.5}}
                else:
                    name = run.layer(int(layer)) if alone else f"{run.name}: {run.layer(int(layer))}"
                    look = {"line": {"color": _shade(int(layer), len(found))}} if alone else {"line": {"width": 1}}
                meta = {"smooth": panel.smooth, "layer": str(layer)}
                add_line(figure, number, name, values, where, meta, name not in shown, **look)
                shown.add(name)
        scale_panel(figure, panel, where)
    text = (
        "One value a MoE layer. A fair share is 1 where all experts are asked for equally often. Entropy is 1 for a gate that "
        "does not choose, 0 for one that is certain. Dead experts got no token for many steps."
    )
    return Chart("router", "Routers: drops, balance, certainty", text, on_clock(figure))


def _mean(series: list[Series]) -> Series | None:
    """Over layers; None if they were not logged together."""
    if not series or any(not np.array_equal(each.steps, series[0].steps) for each in series):
        return None
    return Series(series[0].steps, np.mean([each.values for each in series], axis=0))


def _shade(layer: int, layers: int) -> str:
    """From dark to light with depth; colour-blind people see the lightness."""
    depth = layer / max(1, layers - 1)
    shade: str = sample_colorscale("Viridis", [0.85 * depth])[0]
    return shade


def load_maps(number: int, run: Run) -> Chart | None:
    """Every expert's load over time, a panel for each layer of one run."""
    if run.loads is None:
        return None
    experts = [requests.shape[1] for requests in run.loads.requests]
    loads = run.loads.thinned(max(8, min(160, CELLS // sum(experts))))
    columns = 1 if len(experts) <= 3 else 2
    titles = [f"{run.layer(layer)}, {count} experts" for layer, count in enumerate(experts)]
    panel = max(110, min(260, 7 * max(experts)))
    figure = grid_of_panels(titles, columns, panel)
    for layer, requests in enumerate(loads.requests):
        fair = requests.mean(axis=1, keepdims=True)
        ratio = np.divide(requests, fair, out=np.full_like(requests, np.nan), where=fair > 0)  # [N, E]
        figure.add_trace(heat_map(ratio.T, loads.steps, number, layer == 0), **place(layer, columns))
        figure.update_yaxes(title="expert", **place(layer, columns))
    text = (
        "How often the router asked for each expert in an interval, before anything was dropped: white is a fair share, red more "
        f"(dark red {MOST:g} times and above), blue less, black nothing at all."
    )
    title = f"Load of every expert over time (times a fair share): {run.name}"
    return Chart(f"load-{number}", title, text, on_clock(figure))


def heat_map(ratio: np.ndarray, steps: np.ndarray, run: int, bar: bool) -> go.Heatmap:
    """`ratio` `[E, N]` over the clock."""
    return go.Heatmap(
        z=[[round(float(cell), 2) if np.isfinite(cell) else None for cell in row] for row in ratio],
        x=[float(step) for step in steps],
        colorscale=RATIO_COLOURS,
        zmin=0,
        zmax=MOST,
        showscale=bar,
        colorbar=ratio_bar(),
        meta={"run": run, "clock": True},
        hovertemplate="expert %{y} at %{x:.3~s}<br>%{z:.2f} times a fair share<extra></extra>",
    )


def ratio_bar() -> dict[str, object]:
    """The colours' legend."""
    return {
        "title": "times a<br>fair share<br> ",
        "thickness": 14,
        "len": 220,
        "lenmode": "pixels",
        "y": 1,
        "yanchor": "top",
        "tickvals": [0, 0.5, 1, 2, 3, 4],
        "ticktext": ["0", "½", "1", "2", "3", "≥ 4"],
    }


def charts(runs: Sequence[Run]) -> list[Chart]:
    """All of the above that the runs have data for."""
    made = [router(runs), *(load_maps(number, run) for number, run in enumerate(runs))]
    return [chart for chart in made if chart is not None]
