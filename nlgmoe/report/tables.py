"""Tables of a page, in HTML: what each run came to, how it was set, and in what the runs differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import yaml

from nlgmoe.report.drawing import colour_of
from nlgmoe.report.runs import Run

UNKNOWN = "–"
OWN = ("trainer.default_root_dir", "ckpt_path")  # settings that are another for every run


def summary(runs: Sequence[Run]) -> str:
    """A row for each run."""
    domains = list(
        dict.fromkeys(name for run in runs for name in run.summary.get("bits_per_byte") or {} if name != "all")
    )
    columns: dict[str, Callable[[Run], str]] = {
        "parameters": lambda run: _count((run.parameters() or (None, None))[0]),
        "active": lambda run: _count((run.parameters() or (None, None))[1]),
        "experts": _experts,
        "steps": lambda run: _whole(run.summary.get("steps", _last_step(run))),
        "tokens": lambda run: _count(run.summary.get("tokens", run.last("train/tokens"))),
        "training loss<br>(nats/token)": lambda run: _decimal(run.summary.get("train_loss", run.last("train/loss")), 3),
        "validation loss<br>(nats/token)": lambda run: _decimal(run.summary.get("val_loss") or run.last("val/loss"), 3),
        "bits per byte": lambda run: _decimal(_bits(run, "all"), 3),
        **{
            f"bits per byte:<br>{escape(name)}": lambda run, name=name: _decimal(_bits(run, name), 3)
            for name in domains
        },  # type: ignore[misc]
        "tokens/s": lambda run: _whole(run.summary.get("tokens_per_second") or run.last("train/tokens_per_second")),
        "peak memory<br>(GB)": lambda run: _decimal(_scaled(run.summary.get("peak_memory_bytes"), 1e-9), 2),
        "time": lambda run: duration(run.summary.get("wall_seconds", run.last("time/elapsed"))),
        "ended": lambda run: "yes" if run.summary else "not yet",
    }
    head = "".join(f"<th>{name}</th>" for name in ["run", *columns])
    rows = [
        f"<tr><th>{label(number, run)}</th>" + "".join(f"<td>{cell(run)}</td>" for cell in columns.values()) + "</tr>"
        for number, run in enumerate(runs)
    ]
    return _table(head, rows)


def versions(runs: Sequence[Run]) -> str:
    """Of what the runs were made with, a row for each package."""
    found = [run.versions or run.summary.get("versions") or {} for run in runs]
    packages = list(dict.fromkeys(package for version in found for package in version))
    return _by_run(runs, [(package, [version.get(package) for version in found]) for package in packages])


def differences(runs: Sequence[Run]) -> str:
    """Settings that are not the same in all runs; a sentence if there are none."""
    flat = [flattened(run.config) for run in runs]
    names = [name for name in dict.fromkeys(name for settings in flat for name in settings) if name not in OWN]
    rows = [(name, [settings.get(name, UNKNOWN) for settings in flat]) for name in names]
    rows = [(name, values) for name, values in rows if any(value != values[0] for value in values)]
    return _by_run(runs, rows) if rows else "<p>They have the same settings.</p>"


def settings(runs: Sequence[Run]) -> str:
    """The whole configuration of each run, folded."""
    parts = []
    for number, run in enumerate(runs):
        text = escape(yaml.safe_dump(run.config, sort_keys=False)) if run.config else "not known"
        parts.append(f"<details><summary>{label(number, run)}: all settings</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


def notes(runs: Sequence[Run]) -> str:
    """What is missing, a list for each run; nothing if nothing is."""
    parts = [f"<li>{label(number, run)} {escape(note)}</li>" for number, run in enumerate(runs) for note in run.notes]
    return f'<ul class="notes">{"".join(parts)}</ul>' if parts else ""


def label(number: int, run: Run) -> str:
    """A run's name with its colour."""
    return f'<span class="run" style="--colour: {colour_of(number)}" title="{escape(str(run.path))}">{escape(run.name)}</span>'


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; lists of plain values stay whole."""
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{name}" if prefix else str(name), item) for name, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(f"{prefix}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {prefix: value} if prefix else {}
    return {name: leaf for path, item in items for name, leaf in flattened(item, path).items()}


def duration(seconds: float | None) -> str:
    """As people say it."""
    if seconds is None:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _by_run(runs: Sequence[Run], rows: Sequence[tuple[str, Sequence[Any]]]) -> str:
    head = "<th></th>" + "".join(f"<th>{label(number, run)}</th>" for number, run in enumerate(runs))
    body = [
        f"<tr><th>{escape(name)}</th>"
        + "".join(
            f"<td>{escape(UNKNOWN if value is None and name == 'version' else _shown(value))}</td>" for value in values
        )
        + "</tr>"
        for name, values in rows
    ]
    return _table(head, body, "settings")


def _table(head: str, rows: Sequence[str], kind: str = "") -> str:
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _experts(run: Run) -> str:
    if run.model is None or run.model.moe is None:
        return UNKNOWN if run.model is None else "none"
    experts = run.model.moe.num_experts
    return str(experts) if isinstance(experts, int) else "/".join(map(str, experts))


def _bits(run: Run, domain: str) -> float | None:
    found = (run.summary.get("bits_per_byte") or {}).get(domain)
    return found if found is not None else run.last("val/bits_per_byte" + ("" if domain == "all" else f"/{domain}"))


def _last_step(run: Run) -> float | None:
    return max((float(series.steps[-1]) + 1 for series in run.metrics.values()), default=None)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _count(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:,.0f}"


def _whole(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _decimal(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"
