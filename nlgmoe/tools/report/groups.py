"""Groups of runs that differ in a seed alone: their means, and paired differences at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

import numpy as np
import pandas as pd
from plotly.colors import hex_to_rgb
from scipy import stats

from nlgmoe.run.folder import flattened
from nlgmoe.tools.report import tables
from nlgmoe.tools.report.drawing import Chart, Panel, Trace, line
from nlgmoe.tools.report.runs import PALETTE, Run, finite_number
from nlgmoe.validation import SettingError, as_yaml

PLACES = ("default_root_dir", "dirpath", "save_dir", "ckpt_path")  # settings of where a run writes, by their last part
MAX_NAMED = 3  # settings in a group's name
Key = tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for one."""

    runs: dict[Key, Run]  # by the values of the setting; their colours are shades of the group's
    mean: Run  # named by what sets the group apart, with means of metrics at the steps that the runs share


def group_runs(runs: Sequence[Run], setting: str) -> list[Group]:
    """Group runs whose settings differ in `setting` alone, and in where they write.

    The end of a setting's name is enough, such as `seed` for both `model.seed` and `data.seed`.
    """
    members: dict[str, dict[Key, Run]] = {}
    shared: list[dict[str, Any]] = []
    flat = [flattened(run.config) for run in runs]
    varied = [[name for name in settings if f".{name}".endswith(f".{setting}")] for settings in flat]
    paired_by = sorted(set.intersection(*map(set, varied)))  # a router's own seed is in some runs alone
    for run, settings, names in zip(runs, flat, varied, strict=True):
        if not names:
            raise SettingError(
                f"group_by={setting}: {run.name} has no setting whose name ends so in config.yaml; use seed"
            )
        rest = {
            name: value
            for name, value in settings.items()
            if name not in names and name.split(".")[-1] not in PLACES and not name.startswith("trainer.logger")
        }
        group = members.setdefault(str(sorted(rest.items())), {})
        if not group:
            shared.append(rest)
        key = tuple(str(settings[name]) for name in paired_by)
        if key in group:
            raise SettingError(
                f"group_by={setting}: {group[key].name} and {run.name} have the same settings and {setting}; leave one out"
            )
        group[key] = run
    names = _names(shared, [list(group.values()) for group in members.values()])
    return [_group(index, name, group) for index, (name, group) in enumerate(zip(names, members.values(), strict=True))]


def _names(settings: list[dict[str, Any]], runs: list[list[Run]]) -> list[str]:
    """Name groups by the settings that differ between them; by the beginning of the runs' folders where these are too many."""
    names = dict.fromkeys(name for of_group in settings for name in of_group)
    different = [name for name in names if len({str(of_group.get(name, "")) for of_group in settings}) > 1]
    if not 0 < len(different) <= MAX_NAMED:
        return [commonprefix([run.name for run in group]).rstrip("_-./") or group[0].name for group in runs]  # noqa: RUF071
    short = [name.rpartition(".")[2] for name in different]
    labels = {name: end if short.count(end) == 1 else name for name, end in zip(different, short, strict=True)}
    return [
        ", ".join(f"{label}={as_yaml(of_group[name])}" for name, label in labels.items() if name in of_group)
        for of_group in settings
    ]


def _group(index: int, name: str, runs: dict[Key, Run]) -> Group:
    colour = PALETTE[index % len(PALETTE)]
    shaded = {}
    for (key, run), shade in zip(runs.items(), np.linspace(0.3, 0.6, len(runs)), strict=True):
        parts = (round(part + (255 - part) * shade) for part in hex_to_rgb(colour))
        shaded[key] = replace(run, colour="#" + "".join(f"{part:02X}" for part in parts))
    first = next(iter(runs.values()))
    means = {metric: _values(runs, metric).mean(axis=1, skipna=False) for metric in first.metrics}
    metrics = {metric: mean for metric, mean in means.items() if len(mean)}
    mean = Run(name, first.path.parent, metrics, config=first.config, key=f"group{index}", colour=colour, is_group=True)
    return Group(shaded, mean)


def _values(runs: dict[Key, Run], metric: str) -> pd.DataFrame:
    """Return a metric at the steps at which all runs have it, `[steps, runs]`; without rows if there are none."""
    columns = [run.metrics.get(metric, pd.Series(dtype=float)) for run in runs.values()]
    return pd.concat(columns, axis=1, join="inner")


def chart(groups: Sequence[Group]) -> Chart | None:
    """Return the chart of validation loss: the mean over seeds and a band of one standard error, a line per group."""
    traces: list[Trace] = []
    missing = []
    for group in groups:
        values = _values(group.runs, "val/loss")
        if values.empty:
            missing.append(group.mean.name)
            continue
        mean, error = values.mean(axis=1, skipna=False), values.sem(axis=1, skipna=False)
        always = {"curves": None}
        if values.shape[1] > 1:
            fill = f"rgba{(*hex_to_rgb(group.mean.colour), 0.2)}"
            edge: dict[str, Any] = {"line": {"width": 0}, "hoverinfo": "skip", "hovertemplate": None, "mode": "lines"}
            traces.append(line(group.mean, mean - error, len(values), always, **edge))
            traces.append(line(group.mean, mean + error, len(values), always, fill="tonexty", fillcolor=fill, **edge))
        traces.append(line(group.mean, mean, len(values), always, mode="lines+markers"))
    text = "Mean over the runs of a group at the steps at which all of them validated; the band is one standard error."
    if missing:
        text += f" Not shown, because there is no such step: {'; '.join(missing)}."
    panel = Panel("", traces, {"yaxis": {"title": {"text": "nats per token"}}}, 440)
    return Chart("groups", "Validation loss of groups (nats per token)", text, [panel]) if traces else None


def table(groups: Sequence[Group], reference: int = 0) -> str:
    """Return size, cost and validation loss of each group, and the difference from group number `reference`, paired by seed."""
    runs = [list(group.runs.values()) for group in groups]
    facts: dict[str, Callable[[Run], float | None]] = {
        "parameters": lambda run: run.summary.get("params_total"),
        "parameters active for a token": lambda run: run.summary.get("params_active"),
        "FLOPs of a run": lambda run: run.last("train/flops"),
        "tokens/s": lambda run: run.fact("tokens_per_second", "train/tokens_per_second"),
    }
    rows: list[tables.Row] = [("runs", str, [_ended(members) for members in runs])]
    rows += [(name, tables.count, [_mean(map(fact, members)) for members in runs]) for name, fact in facts.items()]
    final = [{key: _final_loss(run) for key, run in group.runs.items()} for group in groups]
    ended = [{key: loss for key, loss in losses.items() if loss is not None} for losses in final]
    rows += _comparison(ended, groups[reference].mean.name, ended[reference])
    return tables.table("groups", [group.mean for group in groups], rows)


def _ended(runs: list[Run]) -> str:
    ended = sum(bool(run.summary) for run in runs)
    lost = ended - sum(_final_loss(run) is not None for run in runs)
    left_out = [f"{ended} ended"] if ended < len(runs) else []
    left_out += [f"{lost} without a finite loss"] if lost else []
    return f"{len(runs)} ({', '.join(left_out)})".removesuffix(" ()")


def _final_loss(run: Run) -> float | None:
    """Return the loss of the last validation; None if it is not finite, or the run has not ended: it is of fewer steps then."""
    return finite_number(run.summary.get("val_loss"))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _comparison(losses: list[dict[Key, float]], name: str, reference: dict[Key, float]) -> list[tables.Row]:
    """Return the rows of mean losses at the end, and of their differences from the reference."""
    differences: list[PairedDifference | None] = []
    for of_group in losses:
        pairs = [key for key in of_group if key in reference and of_group is not reference]
        mine, theirs = [of_group[key] for key in pairs], [reference[key] for key in pairs]
        differences.append(paired_difference(mine, theirs) if pairs else None)
    judged = zip(losses, differences, strict=True)
    return [
        ("at the end: validation loss", tables.decimal_4, [_mean(of_group.values()) for of_group in losses]),
        (f"at the end: minus {name}", "{:+.4f}".format, [item and item.mean for item in differences]),
        ("at the end: standard error", tables.decimal_4, [item and finite_number(item.error) for item in differences]),
        ("at the end: 95% interval", str, [item and _interval(item) for item in differences]),
        ("at the end: pairs", str, [item and item.pairs for item in differences]),
        ("at the end: verdict", str, [_verdict(item, of_group, reference) for of_group, item in judged]),
    ]


def _interval(difference: PairedDifference) -> str | None:
    low, high = difference.interval()
    return f"{low:+.4f} to {high:+.4f}" if difference.pairs > 1 else None


def _verdict(difference: PairedDifference | None, losses: dict[Key, float], reference: dict[Key, float]) -> str | None:
    if losses is reference:
        return None
    if difference is None:
        shared = "no setting has the same value in a run of both"
        return f"no pairs: {shared if losses and reference else 'a group has no loss at the end'}"
    low, high = difference.interval()
    return "lower" if high < 0 else "higher" if low > 0 else "unresolved"


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the differences within pairs, and its standard error.

    A seed fixes the order of the data and the initial dense weights of both models, so what varies in both alike cancels.
    """

    mean: float  # over pairs
    error: float  # standard error of the mean; NaN for one pair
    pairs: int  # number of pairs

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the confidence interval of the mean, by Student's t; infinite for one pair."""
        if self.pairs < 2:
            return -math.inf, math.inf
        half = float(stats.t.ppf((1 + confidence) / 2, self.pairs - 1)) * self.error
        return self.mean - half, self.mean + half


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Compute `first - second` pair by pair: a value of each model for each seed, in the same order."""
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    pairs = len(differences)
    error = float(differences.std(ddof=1) / math.sqrt(pairs)) if pairs > 1 else math.nan
    return PairedDifference(float(differences.mean()), error, pairs)
