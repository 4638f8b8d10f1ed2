"""The page: one self-contained HTML file with plotly.js, data and tables."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np
from plotly.offline import get_plotlyjs

from nlgmoe.cli.arguments import require_folder
from nlgmoe.files import atomic_write
from nlgmoe.tools.html import html_page, json_in_script
from nlgmoe.tools.report import figures, groups, tables
from nlgmoe.tools.report.drawing import Chart, rounded
from nlgmoe.tools.report.runs import CLOCKS, Run
from nlgmoe.validation import RunError, SettingError

MAX_KNOTS = 400  # steps with stored tokens, FLOPs and time; the page interpolates between them


def write_report(
    runs: Sequence[Run], output: str | Path | None = None, group_by: str | None = None, verdict: str | None = None
) -> Path:
    """Write the report of runs from `read_runs`, and return its file; the command documents `output` and `group_by`.

    `verdict`: text in place of the tables of differences between groups; None: the tables.
    """
    file = Path(output) if output is not None else (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    if file.suffix not in (".html", ".htm"):  # protects the files of a run folder
        raise SettingError(f"output={output} is not a name of a page; let it end in .html")
    require_folder(file)
    text = page(runs, group_by, verdict)
    try:
        with atomic_write(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"output={file} cannot be written ({error.strerror}); make room, or name another") from error
    return file


def page(runs: Sequence[Run], group_by: str | None = None, verdict: str | None = None) -> str:
    """Return the page's HTML."""
    grouped = groups.group_runs(runs, group_by) if group_by is not None else []
    if grouped:
        runs = [run for group in grouped for run in group.runs.values()]
    curves = [*runs, *(group.mean for group in grouped)]
    overlaid = groups.chart(grouped) if grouped else None
    title = f"nlgmoe: {', '.join(run.name for run in runs)}"
    layers = max((len(figures.logged_layers(run)) for run in runs), default=0)
    facts = {"clocks": {run.key: clock_values(run) for run in curves}, "names": {run.key: run.name for run in runs}}
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="made">Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC of {", ".join(escape(str(run.path)) for run in runs)}</p>',
        tables.results(runs),
        tables.notes(runs),
        comparison(grouped, str(group_by)) if grouped and verdict is None else "",
        f"<section><h2>Verdict</h2><pre>{escape(verdict)}</pre></section>" if verdict is not None else "",
        controls(layers, "all" if len(curves) == 1 else "mean", bool(grouped)),
        section("Groups", [overlaid] if overlaid else []),
        section("Training", figures.training(curves)),
        section("Experts", figures.experts(curves)),
        section("Specialisation", figures.specialisation(runs)),
        "<section><h2>Settings</h2>",
        f"<h3>What differs</h3>{tables.differences(runs)}" if len(runs) > 1 else "",
        tables.settings(runs),
        f"<h3>Versions</h3>{tables.versions(runs)}",
        "</section>",
    ]
    return html_page(title, "nlgmoe.tools.report", "\n".join(body), facts, [get_plotlyjs()])


def section(name: str, charts: Sequence[Chart]) -> str:
    """Return the HTML of charts under a heading; empty if there are none."""
    parts = []
    for chart in charts:
        panels = "".join(
            f'<div class="panel"><h4>{escape(panel.title)}</h4><div class="plot" style="height: {panel.height}px">'
            '<script type="application/json">'
            f"{json_in_script({'data': panel.traces, 'layout': panel.layout})}</script></div></div>"
            for panel in chart.panels
        )
        parts.append(
            f'<article id="{chart.name}"><h3>{escape(chart.title)}</h3><p>{escape(chart.text)}</p><div class="legend"></div>'
            f'<div class="panels" style="--width: {chart.width}px">{panels}</div></article>'
        )
    return f"<section><h2>{escape(name)}</h2>{''.join(parts)}</section>" if parts else ""


def comparison(grouped: Sequence[groups.Group], setting: str) -> str:
    """Return the tables of groups, one for each reference, of which the page shows the selected one."""
    options = "".join(f"<option>{escape(group.mean.name)}</option>" for group in grouped)
    references = "".join(f'<div class="reference">{groups.table(grouped, i)}</div>' for i in range(len(grouped)))
    return (
        f"<section><h2>Differences between groups, paired by {escape(setting)}</h2>"
        "<p>Unresolved: the interval spans zero.</p>"
        f'<label>minus <select id="reference">{options}</select></label>{references}</section>'
    )


def controls(layers: int, layer: str, grouped: bool) -> str:
    """Return the controls of x axis, smoothing, curves and layers; `layer` is selected of the `layers` layers."""
    names = {"tokens": "tokens", "steps": "steps", "flops": "FLOPs", "seconds": "time"}
    axes = "".join(
        f'<label><input type="radio" name="axis" value="{axis}"{" checked" if axis == "tokens" else ""}> {name}</label>'
        for axis, name in names.items()
    )
    choices = {"all": "each", "mean": "mean"} | {str(index): str(index) for index in range(layers)}
    options = "".join(
        f'<option value="{value}"{" selected" if value == layer else ""}>{name}</option>'
        for value, name in choices.items()
    )
    of_groups = "<option value='groups'>means of groups</option>" if grouped else ""
    of_layers = f'<label>MoE layers <select id="layer">{options}</select></label>' if layers else ""
    return (
        f'<form id="controls"><fieldset><legend>x axis</legend>{axes}</fieldset>'
        '<label>smoothing <input id="smoothing" type="range" min="0" max="0.1" step="0.005" value="0.025"></label>'
        f'<label{"" if grouped else " hidden"}>curves <select id="curves">{of_groups}<option value="runs">runs</option></select>'
        f'</label>{of_layers}<output id="hidden"></output></form>'
    )


def clock_values(run: Run) -> dict[str, list[float | None]]:
    """Return some of a run's steps and, where known, the tokens, FLOPs and seconds up to each."""
    if "train/tokens" not in run.metrics:
        return {"steps": [0.0, float(max((series.index[-1] for series in run.metrics.values()), default=0.0))]}
    steps = run.metrics["train/tokens"].index.to_numpy()
    knots = steps[np.unique(np.linspace(0, len(steps) - 1, MAX_KNOTS).round().astype(int))]
    clocks = {name: values for name in CLOCKS if (values := run.clock(name, knots)) is not None}
    return {"steps": rounded(knots, 9)} | {name: rounded(values, 9) for name, values in clocks.items()}
