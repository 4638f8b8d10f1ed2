"""Groups of runs that differ in a seed alone: their mean and its error over time, and paired differences between groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from os.path import commonprefix
from typing import Any

import numpy as np

from nlgmoe.tools.report.drawing import Chart, add_line, band_colour, grid_cell, panel_grid, run_colour, with_clock_axis
from nlgmoe.tools.report.metrics import Series
from nlgmoe.tools.report.runs import Run, finite_number, flattened
from nlgmoe.tools.statistics import paired_difference
from nlgmoe.validation import SettingError

PLACES = ("default_root_dir", "dirpath", "save_dir", "ckpt_path")  # settings of where a run writes, by their last part
MAX_NAMED = 3  # settings in a group's name
Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for one.

    Attributes:
        name: what sets the group apart from the others.
        runs: index in the page and run, by the names and values of the setting.
    """

    name: str
    runs: dict[Key, tuple[int, Run]]


def group_runs(runs: Sequence[Run], setting: str) -> list[Group]:
    """Group runs whose settings differ in `setting` alone, and in where they write.

    Args:
        runs: of the page.
        setting: its name, or the end of it, such as `seed` for both `model.seed` and `data.seed`.
    """
    found: dict[tuple[str, ...], dict[Key, tuple[int, Run]]] = {}
    shared: list[dict[str, str]] = []
    for number, run in enumerate(runs):
        settings = {name: "null" if value is None else str(value) for name, value in flattened(run.config).items()}
        values = {name: value for name, value in settings.items() if f".{name}".endswith(f".{setting}")}
        if not values:
            raise SettingError(
                f"group_by={setting}: {run.name} has no setting whose name ends so in config.yaml; use seed"
            )
        rest = {n: v for n, v in settings.items() if n not in values and n.rpartition(".")[2] not in PLACES}
        group = found.setdefault(tuple(f"{name}={value}" for name, value in sorted(rest.items())), {})
        if not group:
            shared.append(rest)
        key = tuple(sorted(values.items()))
        if key in group:
            raise SettingError(
                f"group_by={setting}: {group[key][1].name} and {run.name} have the same settings and {setting}; leave one out"
            )
        group[key] = (number, run)
    names = _names(shared, [_common([run.name for _, run in group.values()]) for group in found.values()])
    return [Group(name, group) for name, group in zip(names, found.values(), strict=True)]


def _names(settings: list[dict[str, str]], runs: list[str]) -> list[str]:
    """Name groups by the settings that differ between them; by the runs' folders where these are too many."""
    different = [
        name
        for name in dict.fromkeys(name for one in settings for name in one)
        if len({one.get(name) for one in settings}) > 1
    ]
    if not 0 < len(different) <= MAX_NAMED:
        return runs
    short = [name.rpartition(".")[2] for name in different]
    labels = {name: end if short.count(end) == 1 else name for name, end in zip(different, short, strict=True)}
    return [", ".join(f"{labels[n]}={one[n]}" for n in different if n in one) for one in settings]


def _common(names: list[str]) -> str:
    """Return the beginning that the names share."""
    return commonprefix(names).rstrip("_-./") or names[0]  # noqa: RUF071 (characters are meant)


def chart(groups: Sequence[Group]) -> Chart | None:
    """Return the chart of validation loss: the mean over seeds and a band of one standard error, a line per group."""
    figure, where, drawn = panel_grid([""], 1, 380), grid_cell(0, 1), 0
    missing = []
    for index, group in enumerate(groups):
        series = [run.metrics["val/loss"] for _, run in group.runs.values() if "val/loss" in run.metrics]
        common = set.intersection(*(set(one.steps.tolist()) for one in series)) if series else set()
        if len(series) < len(group.runs) or not common:
            missing.append(group.name)
            continue
        steps = np.array(sorted(common))
        values = np.array([one.values[np.isin(one.steps, steps)] for one in series])  # [seeds, steps]
        first = next(iter(group.runs.values()))[0]  # gives the clock
        mean = values.mean(axis=0)
        look: dict[str, Any] = {"line": {"color": run_colour(index), "dash": "solid"}}
        if len(values) > 1:
            error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            edge: dict[str, Any] = {"line": {"width": 0}, "hoverinfo": "skip", "hovertemplate": None}
            add_line(figure, first, group.name, Series(steps, mean - error), where, **edge)
            add_line(
                figure, first, group.name, Series(steps, mean + error), where, fill="tonexty",
                fillcolor=band_colour(index), **edge,
            )  # fmt: skip
        add_line(figure, first, group.name, Series(steps, mean), where, legend=True, mode="lines+markers", **look)
        drawn += 1
    figure.update_yaxes(title="nats per token")
    text = "Mean over the runs of a group at the steps at which all of them validated; the band is one standard error."
    if missing:
        text += f" Not shown, because there is no such step: {'; '.join(missing)}."
    return (
        Chart("groups", "Validation loss of groups (nats per token)", text, with_clock_axis(figure)) if drawn else None
    )


def table(groups: Sequence[Group]) -> str:
    """Return the final validation loss of each group, and its difference from the first group, paired by seed."""
    head = "".join(
        f"<th>{name}</th>"
        for name in ("", "runs", "validation loss", "minus the first group", "standard error", "95% interval", "pairs")
    )
    rows = [_row(index, group, groups[0]) for index, group in enumerate(groups)]
    return (
        f'<div class="wide"><table class="facts" id="differences"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(index: int, group: Group, reference: Group) -> str:
    ended_losses = [loss for _, run in group.runs.values() if (loss := _final_loss(run)) is not None]
    mean = f"{np.mean(ended_losses):.4f}" if ended_losses else "–"
    losses, others = _losses(group, reference), _losses(reference, group)
    pairs = [key for key in losses if key in others] if group is not reference else []
    ended = sum(bool(run.summary) for _, run in group.runs.values())
    left_out = [f"{ended} ended"] if ended < len(group.runs) else []
    if lost := ended - len(ended_losses):
        left_out.append(f"{lost} without a finite loss")
    cells = [f"{len(group.runs)} ({', '.join(left_out)})".removesuffix(" ()"), mean, *[""] * 4]
    if pairs:
        found = paired_difference([losses[key] for key in pairs], [others[key] for key in pairs])
        low, high = found.interval()
        known = found.pairs > 1
        cells[2:] = [
            f"{found.mean:+.4f}",
            f"{found.error:.4f}" if known else "–",
            f"{low:+.4f} to {high:+.4f}" if known else "–",
            str(found.pairs),
        ]
    elif group is not reference:
        cells[2:] = ["no run with the same value in both", "", "", "0"]
    label = f'<span class="run" style="--colour: {run_colour(index)}">{escape(group.name)}</span>'
    return f"<tr><th>{label}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _losses(group: Group, other: Group) -> dict[Key, float]:
    """Return final losses by the settings that both groups have: a router's own seed is in one alone. Empty if two runs agree."""
    known = {name for key in other.runs for name, _ in key}
    keys = [tuple(pair for pair in key if pair[0] in known) for key in group.runs]
    losses = {key: _final_loss(run) for key, (_, run) in zip(keys, group.runs.values(), strict=True)}
    return {key: loss for key, loss in losses.items() if loss is not None} if len(losses) == len(keys) else {}


def _final_loss(run: Run) -> float | None:
    """Return the loss of the last validation; None if it is not finite, or the run has not ended: it is of fewer steps then."""
    return finite_number(run.summary.get("val_loss"))
