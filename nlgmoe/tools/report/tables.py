"""HTML tables of a page, each with its numbers as CSV: results, settings, differences between runs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import pandas as pd
import yaml

from nlgmoe.run.folder import flattened
from nlgmoe.tools.report.runs import BITS, Run
from nlgmoe.validation import as_yaml

UNKNOWN = "–"
whole, decimal, decimal_4 = "{:,.0f}".format, "{:.3f}".format, "{:.4f}".format
PER_RUN = ("trainer.default_root_dir", "ckpt_path")  # settings that differ between all runs
Row = tuple[str, Callable[[Any], str], list[Any]]  # name, format, and a value of each column; None is unknown


def table(name: str, runs: Sequence[Run], rows: Sequence[Row], kind: str = "facts") -> str:
    """Return a table with a column for each run or group, and a link to its values as NAME.csv; `kind` is its CSS class."""
    head = "".join(f"<th>{run_label(run)}</th>" for run in runs)
    body = "".join(
        f"<tr><th>{escape(label)}</th>"
        + "".join(f"<td>{UNKNOWN if value is None else escape(form(value))}</td>" for value in values)
        + "</tr>"
        for label, form, values in rows
    )
    values = pd.DataFrame([row[2] for row in rows], [row[0] for row in rows], [run.name for run in runs], dtype=object)
    link = f"data:text/csv;base64,{b64encode(values.to_csv().encode()).decode()}"
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr><th><a download="{name}.csv" href="{link}">CSV</a></th>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def results(runs: Sequence[Run]) -> str:
    """Return the results: a row per fact, a column per run."""
    logged = {name: f"bits_per_byte.{name.removeprefix(BITS)[1:] or 'all'}" for run in runs for name in run.metrics}
    bits = {fact: name for name, fact in logged.items() if name.startswith(BITS)}
    bits |= {fact: "" for run in runs for fact in run.summary if fact.startswith("bits_per_byte.") and fact not in bits}
    facts: list[tuple[str, Callable[[Any], str], Callable[[Run], Any]]] = [
        ("parameters", count, lambda run: run.summary.get("params_total")),
        ("parameters active for a token", count, lambda run: run.summary.get("params_active")),
        ("experts of each MoE layer", str, _experts),
        ("steps", whole, lambda run: run.summary.get("steps")),
        ("tokens", count, lambda run: run.fact("tokens", "train/tokens")),
        ("FLOPs", count, lambda run: run.last("train/flops")),
        ("training loss (nats per token)", decimal, lambda run: run.fact("train_loss", "train/loss")),
        ("validation loss (nats per token)", decimal, lambda run: run.fact("val_loss", "val/loss")),
        *(
            (fact.replace("_", " ").replace(".", ": "), decimal, lambda run, names=(fact, name): run.fact(*names))
            for fact, name in bits.items()
        ),
        ("speed (tokens/s)", whole, lambda run: run.fact("tokens_per_second", "train/tokens_per_second")),
        ("peak memory (bytes)", count, lambda run: run.summary.get("peak_memory_bytes")),
        ("time", duration, lambda run: run.fact("wall_seconds", "time/elapsed")),
        ("time of training steps", duration, lambda run: run.summary.get("step_seconds")),
        ("time of validations", duration, lambda run: run.summary.get("validation_seconds")),
        ("skipped steps", whole, lambda run: run.fact("skipped_steps", "train/skipped_steps")),
        ("ended", str, lambda run: "yes" if run.summary else "no, or not yet"),
    ]
    return table("results", runs, [(name, form, [fact(run) for run in runs]) for name, form, fact in facts])


def versions(runs: Sequence[Run]) -> str:
    """Return the package versions of each run, a row per package."""
    packages = list(dict.fromkeys(package for run in runs for package in run.versions))
    rows: list[Row] = [(package, str, [run.versions.get(package) for run in runs]) for package in packages]
    return table("versions", runs, rows, "settings")


def differences(runs: Sequence[Run]) -> str:
    """Return the settings that differ between runs, or a sentence if there are none."""
    flat = [flattened(run.config) for run in runs]
    names = [name for name in dict.fromkeys(name for settings in flat for name in settings) if name not in PER_RUN]
    columns = {name: [as_yaml(settings[name]) if name in settings else None for settings in flat] for name in names}
    rows: list[Row] = [(name, str, values) for name, values in columns.items() if any(v != values[0] for v in values)]
    return table("settings", runs, rows, "settings") if rows else "<p>All runs have the same settings.</p>"


def settings(runs: Sequence[Run]) -> str:
    """Return the full configuration of each run, folded."""
    return "\n".join(
        _folded(run, "all settings", yaml.safe_dump(run.config, sort_keys=False) if run.config else "not known")
        for run in runs
    )


def _folded(run: Run, title: str, text: str) -> str:
    return f"<details><summary>{run_label(run)}: {title}</summary><pre>{escape(text)}</pre></details>"


def notes(runs: Sequence[Run]) -> str:
    """Return the notes of all runs as a list; empty if there are none."""
    parts = [f"<li>{run_label(run)}: {escape(note)}</li>" for run in runs for note in run.notes]
    return f'<ul class="notes">{"".join(parts)}</ul>' if parts else ""


def run_label(run: Run) -> str:
    """Return the name of a run or group with its colour."""
    return f'<span class="run" style="--colour: {run.colour}" title="{escape(str(run.path))}">{escape(run.name)}</span>'


def _experts(run: Run) -> str | None:
    if run.model is None or run.model.moe is None:
        return None if run.model is None else "none"
    experts = run.model.moe.num_experts
    return str(experts) if isinstance(experts, int) else "/".join(map(str, experts))


def count(value: float) -> str:
    """Format a large number, such as 1.23M."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return whole(value)


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
