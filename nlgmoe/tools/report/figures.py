"""Charts of training, speed, routers, expert loads over time, and the domains that choose an expert."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from plotly.colors import sample_colorscale

from nlgmoe.eval.trace import Trace as RoutingTrace
from nlgmoe.eval.trace_analyses import LayerAnalysis, analyse
from nlgmoe.tools.report.drawing import HOVER, RATIO_MAX, Chart, Panel, Trace, line, points_of, ratio_heat_map
from nlgmoe.tools.report.runs import BITS, Run

MAX_CELLS = 60_000  # in all heat maps of a run together
MAX_NAMED = 40  # experts with names on the axis
FAINT: dict[str, Any] = {"opacity": 0.4, "line": {"width": 1}, "hoverinfo": "skip", "hovertemplate": None}
DIAMONDS: dict[str, Any] = {
    "mode": "lines+markers",
    "marker": {"symbol": "diamond", "size": 8},
    "line": {"dash": "dash", "width": 1.5},
}
_NAME = re.compile(r"experts/(\d+)/(\w+)")


@dataclass(frozen=True)
class Metric:
    """A metric with its own panel."""

    name: str  # in `metrics.csv`, without `experts/LAYER/` for a metric of MoE layers
    title: str
    log: bool = False  # y axis
    zero: bool = False  # y axis starts at 0
    form: str = ""  # d3 format of the numbers on the y axis
    smooth: bool = True  # by the page's smoothing


OPTIMISATION = (
    Metric("train/lr", "Learning rate", form=".1e", smooth=False),
    Metric("train/grad_norm", "Gradient norm, before clipping", log=True),
    Metric("train/grad_norm_dense", "Gradient norm of all but routers and experts", log=True),
    Metric("train/balance_loss", "Balance loss, sum over layers"),
    Metric("train/z_loss", "Router z-loss, sum over layers"),
    Metric("train/distillation_loss", "Distillation loss (nats per token)"),
    Metric("train/teacher_agreement", "Agreement with the teacher (share of tokens)"),
    Metric("train/skipped_steps", "Skipped steps, in all", zero=True, smooth=False),
    Metric("train/seq_len", "Length of sequences (tokens)", smooth=False),
)
SPEED = (
    Metric("train/tokens_per_second", "Tokens per second, all ranks", form="~s"),
    Metric("train/tflops_per_second", "Model TFLOP/s, all ranks"),
    Metric("train/mfu", "Model FLOPs utilisation", form=".0%"),
    Metric("memory/process_bytes", "Memory of a process (bytes, the most so far)", form="~s", smooth=False),
    Metric("memory/gpu_bytes", "GPU memory of tensors (bytes, the most so far)", form="~s", smooth=False),
    Metric("memory/gpu_reserved_bytes", "GPU memory reserved (bytes, the most so far)", form="~s", smooth=False),
)
ROUTER = (
    Metric("dropped", "Dropped assignments (share)", zero=True, form=".0%"),
    Metric("dead", "Dead experts (number)", zero=True, smooth=False),
    Metric("load_max_over_mean", "Busiest expert's load (times a fair share)", zero=True),
    Metric("load_min_over_mean", "Idlest expert's load (times a fair share)", zero=True),
    Metric("load_cv", "Load imbalance (coefficient of variation)", zero=True),
    Metric("entropy", "Gate entropy (share of its maximum)"),
    Metric("confidence", "Gate's probability of the experts chosen"),
    Metric("logit_rms", "Router logits (root mean square)"),
    Metric("saturation", "Choices in common with the last validation (share)", smooth=False),
    Metric("saturation_shuffled", "The same, with the last choices shuffled", smooth=False),
    Metric("expert_share", "Experts' share of the weights (rest: shared expert)"),
    Metric("grad_norm_router", "Gradient norm of routers", log=True),
    Metric("grad_norm_experts", "Gradient norm of experts", log=True),
)


def training(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of losses, the optimizer and speed that the runs have data for."""
    names = sorted({name for run in runs for name in run.metrics if name.startswith(BITS)})
    domains = [Metric(name, name.removeprefix(BITS).removeprefix("/") or "all text", smooth=False) for name in names]
    charts = [
        Chart(
            "loss",
            "Loss (nats per token)",
            "The faint line is the logged training loss, the solid one is smoothed by a centred mean; diamonds are validation, "
            "on text outside the training set. Balance and distillation losses are not included.",
            _loss(runs),
        ),
        Chart(
            "bits-per-byte",
            "Validation: bits per byte of text",
            "Bits per byte of the original validation text, by domain, comparable across tokenizers. Lower is better; every "
            "panel has its own scale.",
            _panels(runs, domains),
        ),
        Chart(
            "optimisation",
            "Learning rate, gradient norms, other losses",
            "Inputs of the optimizer. A gradient norm above trainer.gradient_clip_val is clipped to it.",
            _panels(runs, OPTIMISATION),
        ),
        Chart(
            "speed",
            "Speed and memory",
            "Per logging interval, without validation and checkpoints. FLOPs are computed from the configuration.",
            _panels(runs, SPEED),
        ),
    ]
    return [chart for chart in charts if chart.panels]


def _loss(runs: Sequence[Run]) -> list[Panel]:
    points, traces = points_of(3 * len(runs)), []
    for run in runs:
        if (series := run.metrics.get("train/loss")) is not None:
            traces += [] if run.is_group else [line(run, series, points, **FAINT)]
            traces.append(line(run, series, points, {"smooth": True}, hovertemplate=f"training {HOVER}"))
        if (series := run.metrics.get("val/loss")) is not None:
            traces.append(line(run, series, points, hovertemplate=f"validation {HOVER}", **DIAMONDS))
    return [Panel("", traces, {"yaxis": {"title": {"text": "nats per token"}}}, 440)] if traces else []


def _panels(runs: Sequence[Run], metrics: Sequence[Metric]) -> list[Panel]:
    points = min(500, points_of(len(metrics) * len(runs)))

    def traces(metric: Metric) -> list[Trace]:
        having = [run for run in runs if metric.name in run.metrics]
        return [line(run, run.metrics[metric.name], points, {"smooth": metric.smooth}) for run in having]

    return _metric_panels(metrics, traces)


def _metric_panels(metrics: Iterable[Metric], traces: Callable[[Metric], list[Trace]]) -> list[Panel]:
    panels = []
    for metric in metrics:
        kind, mode = "log" if metric.log else "linear", "tozero" if metric.zero else "normal"
        layout = {"yaxis": {"type": kind, "rangemode": mode, "tickformat": metric.form}}
        if drawn := traces(metric):
            panels.append(Panel(metric.title, drawn, layout))
    return panels


def logged_layers(run: Run) -> list[int]:
    """Return the MoE layers with logged metrics."""
    return sorted({int(match[1]) for name in run.metrics if (match := _NAME.fullmatch(name))})


def experts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of routers and expert loads that the runs have data for."""
    layers = {run.key: logged_layers(run) for run in runs}
    points = min(300, points_of(len(ROUTER) * sum(len(of_run) + 1 for of_run in layers.values())))
    alone = len(runs) == 1

    def traces(metric: Metric) -> list[Trace]:
        lines = []
        for run in runs:
            names = {layer: f"experts/{layer}/{metric.name}" for layer in layers[run.key]}
            logged = {layer: run.metrics[name] for layer, name in names.items() if name in run.metrics}
            for layer, series in logged.items():
                meta = {"smooth": metric.smooth, "layer": str(layer)}
                depth = 0.85 * min(1.0, layer / max(1, len(logged) - 1))  # colours get lighter with depth
                look = {"color": sample_colorscale("Viridis", [depth])[0]} if alone else {"width": 1}
                name = run.layer(layer) if alone else f"{run.name}: {run.layer(layer)}"
                lines.append(line(run, series, points, meta, name=name, line=look))
            if logged:
                mean = pd.concat(logged.values(), axis=1, join="inner").mean(axis=1, skipna=False)
                lines.append(line(run, mean, points, {"smooth": metric.smooth, "layer": "mean"}))
        return lines

    text = (
        "One value per MoE layer. The fair share is an equal number of assignments for every expert. Entropy is 1 for uniform "
        "probabilities, 0 for a certain choice. Dead experts got no token for many steps."
    )
    routers = Chart("router", "Routers: drops, balance, certainty", text, _metric_panels(ROUTER, traces))
    return [*([routers] if routers.panels else []), *(_load_maps(run) for run in runs if run.loads)]


def _load_maps(run: Run) -> Chart:
    intervals = max(8, min(160, MAX_CELLS // sum(load.shape[1] for load in run.loads)))
    panels = []
    for layer, load in enumerate(run.loads):
        ends = load.index.to_numpy()
        interval = ends[1] - ends[0] if len(ends) > 1 else ends[0]
        begin = ends[0] - interval
        # Of equal steps: a long run's rows thin out.
        bucket = interval * -(-(ends[-1] - begin) // (interval * intervals))
        rows = load.reset_index(names="step").groupby((ends - 1 - begin) // bucket)
        steps, sums = rows["step"].last(), rows[list(load)].sum()  # [N], [N, E]
        fair = sums.mean(axis=1)
        heat_map = ratio_heat_map(sums.div(fair.where(fair > 0), axis=0).to_numpy().T) | {
            "x": steps.tolist(),
            "meta": {"run": run.key, "clock": True},
            "hovertemplate": "expert %{y} at %{x:.3~s}<br>%{z:.2f} times a fair share<extra></extra>",
        }
        height = max(110, min(260, 7 * load.shape[1])) + 60
        title = f"{run.layer(layer)}, {load.shape[1]} experts"
        panels.append(Panel(title, [heat_map], {"yaxis": {"title": {"text": "expert"}}}, height))
    text = (
        "Assignments to each expert in logged intervals, before dropping: white is the fair share, red more "
        f"(dark red {RATIO_MAX:g} times and above), blue less, black none."
    )
    title = f"Load of every expert over time (times a fair share): {run.name}"
    return Chart(f"load-{run.key}", title, text, panels, 480)


def specialisation(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of expert specialisation that the runs have data for."""
    return [_preferences(run, run.trace) for run in runs if run.trace is not None and len(run.trace.facts.domains) > 1]


def _preferences(run: Run, trace: RoutingTrace) -> Chart:
    layers = range(len(trace.facts.blocks))
    panels = [_preference(run.layer(layer), analyse(trace, layer)) for layer in layers]
    text = (
        f"Validation text after {trace.facts.step:,} steps: the share of a domain's tokens that choose an expert, over the mean "
        f"of the domains. White is no preference, red more (dark red {RATIO_MAX:g} times and above), blue less, black "
        "none; grey: an unused expert. Experts are sorted by the domain that prefers them."
    )
    title = f"What experts are used for (times the mean of the domains): {run.name}"
    return Chart(f"preference-{run.key}", title, text, panels, 480)


def _preference(title: str, analysis: LayerAnalysis) -> Panel:
    """Return a heat map of a MoE layer's preferences by domain."""
    seen = ~np.isnan(analysis.by_domain).all(axis=1)
    names, shares, ratio = (
        np.array(analysis.domains)[seen],
        analysis.by_domain[seen],
        analysis.preference[seen],
    )  # [D], [D, E]
    known = np.nan_to_num(ratio, nan=-1.0)
    order = np.lexsort((-known.max(axis=0), known.argmax(axis=0), np.isnan(ratio).all(axis=0)))  # [E]
    details = [[[int(expert), round(float(row[expert]), 4)] for expert in order] for row in shares]
    heat_map = ratio_heat_map(ratio[:, order]) | {
        "y": names.tolist(),
        "customdata": details,
        "hovertemplate": "%{y}, expert %{customdata[0]}: %{z:.2f} times the mean of the domains<br>%{customdata[1]:.1%} of the "
        "domain's tokens<extra></extra>",
    }
    axis = {"showgrid": False, "title": {"text": "expert", "standoff": 4}, "tickangle": 0, "tickfont": {"size": 9}}
    axis |= {"tickvals": list(range(len(order))), "ticktext": [str(expert) for expert in order]}
    axis["showticklabels"] = len(order) <= MAX_NAMED
    layout = {"xaxis": axis, "yaxis": {"autorange": "reversed", "showgrid": False}, "plot_bgcolor": "#D9DEE4"}
    return Panel(title, [heat_map], layout, max(130, 24 * len(names)) + 60)
