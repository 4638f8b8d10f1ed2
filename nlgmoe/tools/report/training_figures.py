"""Charts of training: losses, bits per byte, the optimizer, speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from nlgmoe.tools.report.drawing import (
    MAX_POINTS,
    PALETTE,
    Chart,
    Panel,
    add_line,
    apply_style,
    grid_cell,
    metric_panels,
    panel_grid,
    with_clock_axis,
)
from nlgmoe.tools.report.metrics import Series
from nlgmoe.tools.report.runs import Run

BITS = "val/bits_per_byte"
PARTS = ("data", "forward", "backward", "optimizer")  # of a step; communication lies within them
OPTIMISATION = (
    Panel("train/lr", "Learning rate", form=".1e", smooth=False),
    Panel("train/grad_norm", "Gradient norm, before clipping", log=True),
    Panel("train/grad_norm_dense", "Gradient norm of all but routers and experts", log=True),
    Panel("train/balance_loss", "Balance loss, sum over layers"),
    Panel("train/z_loss", "Router z-loss, sum over layers"),
    Panel("train/distillation_loss", "Distillation loss (nats per token)"),
    Panel("train/teacher_agreement", "Agreement with the teacher (share of tokens)"),
    Panel("train/skipped_steps", "Skipped steps, in all", smooth=False),
    Panel("train/seq_len", "Length of sequences (tokens)", smooth=False),
)
SPEED = (
    Panel("train/tokens_per_second", "Tokens per second, all ranks", form="~s"),
    Panel("train/tflops_per_second", "Model TFLOP/s, all ranks"),
    Panel("train/mfu", "Model FLOPs utilisation", form=".0%"),
    Panel("memory/process_bytes", "Memory of a process (bytes, the most so far)", form="~s", smooth=False),
    Panel("memory/gpu_bytes", "GPU memory of tensors (bytes, the most so far)", form="~s", smooth=False),
    Panel("memory/gpu_reserved_bytes", "GPU memory reserved (bytes, the most so far)", form="~s", smooth=False),
)


def loss(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of training and validation loss."""
    if not any("train/loss" in run.metrics or "val/loss" in run.metrics for run in runs):
        return None
    figure = panel_grid([""], 1, 380)
    where = grid_cell(0, 1)
    points = min(1000, MAX_POINTS // (2 * len(runs)))
    for number, run in enumerate(runs):
        if "train/loss" in run.metrics:
            series = run.metrics["train/loss"].thinned(points)
            look: dict[str, Any] = {"opacity": 0.45, "line": {"width": 1}, "hoverinfo": "skip", "hovertemplate": None}
            add_line(figure, number, f"{run.name}: training", series, where, **look)
            add_line(figure, number, f"{run.name}: training", series, where, {"smooth": True}, legend=True)
        if "val/loss" in run.metrics:
            series = run.metrics["val/loss"].thinned(points)
            marker = {"symbol": "diamond", "size": 8, "line": {"color": "white", "width": 1}}
            look = {"mode": "lines+markers", "line": {"dash": "dash", "width": 1.5}, "marker": marker}
            add_line(figure, number, f"{run.name}: validation", series, where, legend=True, **look)
    figure.update_yaxes(title="nats per token")
    text = (
        "The faint line is the logged loss, the solid one is smoothed; diamonds are validation, on text outside the training "
        "set. Balance and distillation losses are not included."
    )
    return Chart("loss", "Loss (nats per token)", text, with_clock_axis(figure))


def bits_per_byte(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of bits per byte, of all validation text and by domain."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics if name.startswith(BITS)))
    names.sort(key=lambda name: name != BITS)
    if not names:
        return None
    titles = [name.removeprefix(f"{BITS}/") if name != BITS else "all text" for name in names]
    columns = min(3, len(names))
    figure = panel_grid(titles, columns)
    shown: set[int] = set()
    for index, name in enumerate(names):
        for number, run in enumerate(runs):
            if name in run.metrics:
                series = run.metrics[name].thinned(200)
                legend = number not in shown and len(runs) > 1
                add_line(
                    figure, number, run.name, series, grid_cell(index, columns), None, legend, mode="lines+markers"
                )
                shown.add(number)
    text = (
        "Bits per byte of the original validation text, by domain, comparable across tokenizers. "
        "Lower is better; every panel has its own scale."
    )
    return Chart("bits-per-byte", "Validation: bits per byte of text", text, with_clock_axis(figure))


def optimisation(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of learning rate, gradient norms and auxiliary losses."""
    panels = [panel for panel in OPTIMISATION if panel.metric != "train/skipped_steps" or any_skipped(runs)]
    figure = metric_panels(runs, panels)
    text = "Inputs of the optimizer. A gradient norm above trainer.gradient_clip_val is clipped to it."
    return (
        None if figure is None else Chart("optimisation", "Learning rate, gradient norms, other losses", text, figure)
    )


def any_skipped(runs: Sequence[Run]) -> bool:
    """Return True if a run skipped a step."""
    return any(bool(run.last("train/skipped_steps")) for run in runs)


def speed(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of throughput and memory."""
    figure = metric_panels(runs, SPEED)
    text = "Per logging interval, without validation and checkpoints. FLOPs are computed from the configuration."
    return None if figure is None else Chart("speed", "Speed and memory", text, figure)


def time_split(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of step time by part, a bar per run."""
    timed = [(number, run) for number, run in enumerate(runs) if "time/step" in run.metrics]
    if not timed:
        return None
    means = {run.name: {part: _mean(run.metrics.get(f"time/{part}")) for part in (*PARTS, "step")} for _, run in timed}
    figure = apply_style(go.Figure())
    for index, part in enumerate((*PARTS, "rest")):
        seconds = [
            mean["step"] - sum(mean[known] for known in PARTS) if part == "rest" else mean[part]
            for mean in means.values()
        ]
        shares = [max(0.0, second) / mean["step"] for second, mean in zip(seconds, means.values(), strict=True)]
        figure.add_bar(
            y=list(means),
            x=[round(1e3 * max(0.0, second), 4) for second in seconds],
            customdata=shares,
            name=part,
            orientation="h",
            marker_color=(*PALETTE[:4], "#9AA5B1")[index],
            hovertemplate="%{x:.4~g} ms, %{customdata:.1%} of a step",
        )
    figure.update_layout(barmode="stack", legend_traceorder="normal", height=130 + 36 * len(timed))
    figure.update_xaxes(title="milliseconds per step, mean over the run")
    figure.update_yaxes(autorange="reversed")
    text = "Mean over ranks."
    waits = [
        f"{run.name} {value / means[run.name]['step']:.0%}"
        for _, run in timed
        if (value := _mean(run.metrics.get("time/communication")))
    ]
    if waits:
        text += f" Waiting for other ranks and sending lies within these parts: {', '.join(waits)} of a step."
    return Chart("time-split", "What a step's time goes to (ms)", text, figure)


def _mean(series: Series | None) -> float:
    return float(series.values.mean()) if series is not None and len(series) else 0.0


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts that the runs have data for."""
    made = (loss(runs), bits_per_byte(runs), optimisation(runs), speed(runs), time_split(runs))
    return [chart for chart in made if chart is not None]
