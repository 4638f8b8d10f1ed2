"""The page: one self-contained HTML file with plotly.js, data and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from nlgmoe.cli.output_files import require_folder
from nlgmoe.files import atomic_write
from nlgmoe.tools.report import expert_figures, groups, specialisation_figures, tables, training_figures
from nlgmoe.tools.report.drawing import Chart, rounded
from nlgmoe.tools.report.runs import CLOCKS, Run
from nlgmoe.validation import RunError, SettingError

MAX_KNOTS = 400  # steps with stored tokens, FLOPs and time; the page interpolates between them


def write_report(runs: Sequence[Run], output: str | Path | None = None, group_by: str | None = None) -> Path:
    """Write the report of one or several runs.

    Args:
        runs: the runs, from `read_runs`.
        output: HTML file; None: `report.html`, in the run folder or, for several runs, in the working directory.
        group_by: setting in which alone the runs of a group differ, such as `seed`; None: no groups.

    Returns:
        The file.

    Raises:
        ValueError: `output` is a folder, is in none, does not end in .html, or cannot be written; or the runs cannot be grouped.
    """
    file = Path(output) if output is not None else (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    if file.is_dir():
        raise SettingError(f"output={output} is a folder; give the name of a file")
    if file.suffix not in (".html", ".htm"):  # protects the files of a run folder
        raise SettingError(f"output={output} is not a name of a page; let it end in .html")
    require_folder(file)
    text = page(runs, group_by)
    try:
        with atomic_write(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"output={file} cannot be written ({error.strerror}); make room, or name another") from error
    return file


def page(runs: Sequence[Run], group_by: str | None = None) -> str:
    """Return the page's HTML."""
    grouped = groups.group_runs(runs, group_by) if group_by is not None else []
    overlaid = groups.chart(grouped) if grouped else None
    title = f"nlgmoe: {', '.join(run.name for run in runs)}"
    sections = {
        "Training": training_figures.charts(runs),
        "Experts": expert_figures.charts(runs),
        "Specialisation": specialisation_figures.charts(runs),
    }
    layers = max((len(expert_figures.logged_layers(run)) for run in runs), default=0)
    facts = {"clocks": [clock_values(run) for run in runs], "names": [run.name for run in runs]}
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="made">Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC of {", ".join(escape(str(run.path)) for run in runs)}</p>',
        tables.summary(runs),
        tables.other_tokens(runs),
        tables.issue_list(runs),
        f"<h2>Differences between groups, paired by {escape(str(group_by))}</h2>{groups.table(grouped)}"
        if grouped
        else "",
        controls(layers, "all" if len(runs) == 1 else "mean"),
        section("Groups", [overlaid]) if overlaid is not None else "",
        *(section(name, found) for name, found in sections.items() if found),
        tables.samples(runs),
        "<section><h2>Settings</h2>",
        f"<h3>What differs</h3>{tables.differences(runs)}" if len(runs) > 1 else "",
        tables.settings(runs),
        f"<h3>Versions</h3>{tables.versions(runs)}",
        "</section>",
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_own("page.css")}</style>
</head>
<body>
<main>
{chr(10).join(body)}
</main>
<script id="facts" type="application/json">{_json(facts)}</script>
<script>{get_plotlyjs()}</script>
<script>{_own("page.js")}</script>
</body>
</html>
"""


def section(name: str, charts: Sequence[Chart]) -> str:
    """Return the HTML of charts under a heading."""
    parts = [
        f'<article id="{chart.name}"><h3>{escape(chart.title)}</h3><p>{escape(chart.text)}</p>'
        f'<div class="chart" style="height: {chart.figure.layout.height}px">'
        f'<script type="application/json">{_json(json.loads(chart.figure.to_json()))}</script></div></article>'
        for chart in charts
    ]
    return f"<section><h2>{escape(name)}</h2>{''.join(parts)}</section>"


def controls(layers: int, layer: str) -> str:
    """Return the controls of x axis, smoothing and layers; `layer` is selected of the `layers` layers."""
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
    of_layers = f'<label>MoE layers <select id="layer">{options}</select></label>' if layers else ""
    return (
        f'<form id="controls"><fieldset><legend>x axis</legend>{axes}</fieldset>'
        '<label>smoothing <input id="smoothing" type="range" min="0" max="0.99" step="0.01" value="0.6"></label>'
        f'{of_layers}<output id="hidden"></output></form>'
    )


def clock_values(run: Run) -> dict[str, list[float | None]]:
    """Return some of a run's steps and, where known, the tokens, FLOPs and seconds up to each."""
    if "train/tokens" not in run.metrics:
        steps = max((series.steps[-1] for series in run.metrics.values()), default=0.0)
        return {"steps": [0.0, float(steps)]}
    steps = run.metrics["train/tokens"].steps
    knots = steps[np.unique(np.linspace(0, len(steps) - 1, MAX_KNOTS).round().astype(int))]
    found = {"steps": rounded(knots, 9)}
    for clock, metric in CLOCKS.items():
        if metric in run.metrics:
            series = run.metrics[metric]
            # A metric of a finished step stands one step after the tokens before it; all are 0 before the first.
            origin = [0.0] if series.steps[0] > 0 else []
            known = np.interp(knots, [*origin, *series.steps], [*origin, *series.values])
            found[clock] = rounded(known, 9)
    return found


def _json(value: Any) -> str:
    """Return JSON for a script element, with the end tag escaped."""
    return json.dumps(value, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\!--")


def _own(name: str) -> str:
    return files("nlgmoe.tools.report").joinpath(name).read_text(encoding="utf-8")
