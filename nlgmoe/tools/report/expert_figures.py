"""Charts of routers and expert loads over time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from plotly.colors import sample_colorscale

from nlgmoe.tools.report.drawing import (
    MAX_POINTS,
    RATIO_MAX,
    Chart,
    Panel,
    add_line,
    grid_cell,
    panel_grid,
    ratio_heat_map,
    scale_panel,
    with_clock_axis,
)
from nlgmoe.tools.report.metrics import Series
from nlgmoe.tools.report.runs import Run

MAX_CELLS = 60_000  # in all heat maps of a run together
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


def logged_layers(run: Run) -> list[int]:
    """Return the MoE layers with logged metrics."""
    return sorted({int(match[1]) for name in run.metrics if (match := _NAME.fullmatch(name))})


def router(runs: Sequence[Run]) -> Chart | None:
    """Return a chart with a panel per routing statistic; the page selects the layers."""
    layers = {number: logged_layers(run) for number, run in enumerate(runs)}
    panels = [
        panel
        for panel in PANELS
        if any(f"experts/{layer}/{panel.metric}" in runs[run].metrics for run in layers for layer in layers[run])
    ]
    if not panels:
        return None
    columns = min(3, len(panels))
    figure = panel_grid([panel.title for panel in panels], columns)
    points = min(300, MAX_POINTS // (len(panels) * sum(len(found) + 1 for found in layers.values())))
    alone, shown = len(runs) == 1, set()
    for index, panel in enumerate(panels):
        where = grid_cell(index, columns)
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
                    look = (
                        {"line": {"color": _depth_colour(int(layer), len(found))}} if alone else {"line": {"width": 1}}
                    )
                meta = {"smooth": panel.smooth, "layer": str(layer)}
                add_line(figure, number, name, values, where, meta, name not in shown, **look)
                shown.add(name)
        scale_panel(figure, panel, where)
    text = (
        "One value per MoE layer. The fair share is an equal number of assignments for every expert. Entropy is 1 for uniform "
        "probabilities, 0 for a certain choice. Dead experts got no token for many steps."
    )
    return Chart("router", "Routers: drops, balance, certainty", text, with_clock_axis(figure))


def _mean(series: list[Series]) -> Series | None:
    """Return the mean over layers; None if their steps differ."""
    if not series or any(not np.array_equal(other.steps, series[0].steps) for other in series):
        return None
    return Series(series[0].steps, np.mean([layer.values for layer in series], axis=0))


def _depth_colour(layer: int, layers: int) -> str:
    """Return a colour that gets lighter with depth."""
    colour: str = sample_colorscale("Viridis", [0.85 * min(1.0, layer / max(1, layers - 1))])[0]
    return colour


def load_maps(number: int, run: Run) -> Chart | None:
    """Return the heat maps of expert load over time of one run, a panel per layer."""
    if run.loads is None:
        return None
    experts = [requests.shape[1] for requests in run.loads.requests]
    loads = run.loads.thinned(max(8, min(160, MAX_CELLS // sum(experts))))
    columns = 1 if len(experts) <= 3 else 2
    titles = [f"{run.layer(layer)}, {count} experts" for layer, count in enumerate(experts)]
    panel = max(110, min(260, 7 * max(experts)))
    figure = panel_grid(titles, columns, panel)
    for layer, requests in enumerate(loads.requests):
        fair = requests.mean(axis=1, keepdims=True)
        ratio = np.divide(requests, fair, out=np.full_like(requests, np.nan), where=fair > 0)  # [N, E]
        figure.add_heatmap(
            **ratio_heat_map(ratio.T, bar=layer == 0),
            x=[float(step) for step in loads.steps],
            meta={"run": number, "clock": True},
            hovertemplate="expert %{y} at %{x:.3~s}<br>%{z:.2f} times a fair share<extra></extra>",
            **grid_cell(layer, columns),
        )
        figure.update_yaxes(title="expert", **grid_cell(layer, columns))
    text = (
        "Assignments to each expert per logging interval, before dropping: white is the fair share, red more "
        f"(dark red {RATIO_MAX:g} times and above), blue less, black none."
    )
    title = f"Load of every expert over time (times a fair share): {run.name}"
    return Chart(f"load-{number}", title, text, with_clock_axis(figure))


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts that the runs have data for."""
    made = [router(runs), *(load_maps(number, run) for number, run in enumerate(runs))]
    return [chart for chart in made if chart is not None]
