"""Run folders, read with pandas. A missing file is listed and leaves out its part of the page; a damaged one is an error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import yaml
from scipy.interpolate import make_interp_spline

from nlgmoe.callbacks.routing_windows import recorded
from nlgmoe.config import GPTConfig
from nlgmoe.eval.trace import Trace
from nlgmoe.eval.trace_analyses import saturation
from nlgmoe.parts import ForeignCodeError, without_parts
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.run.folder import flattened
from nlgmoe.validation import RunError, SettingError

T = TypeVar("T")
CONFIG, SUMMARY, VERSIONS = "config.yaml", "summary.json", "versions.json"
METRICS, LOADS = "metrics.csv", "expert_load.csv"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
BITS = "val/bits_per_byte"  # of all text; with /NAME of a domain
AFTER_STEP = ("val/", "train/flops", "time/elapsed")  # metrics of the state after the logged step
CLOCKS = {"tokens": "train/tokens", "flops": "train/flops", "seconds": "time/elapsed"}  # x axis -> metric
# Okabe and Ito's colour-blind safe palette, without yellow, which is too light for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass
class Run:
    """A run, or the mean of a group of runs; what a missing file would hold is None or empty."""

    name: str  # short, unique in a page
    path: Path  # the run folder
    metrics: dict[str, pd.Series] = field(default_factory=dict)  # over optimizer steps taken; NaN and infinity are kept
    loads: list[pd.DataFrame] = field(default_factory=list)  # of each MoE layer, see `loads_of`
    trace: Trace | None = None  # choices of experts at the last validation
    config: dict[str, Any] = field(default_factory=dict)  # the resolved configuration of the last start, nested
    summary: dict[str, Any] = field(default_factory=dict)  # `summary.json`, by dotted names
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # missing files and values that are not finite, a sentence each
    key: str = ""  # identifies the run, or the group, in the page
    colour: str = PALETTE[0]  # in all charts
    is_group: bool = False

    @cached_property
    def model(self) -> GPTConfig | None:
        """The model's configuration, without parts from outside `nlgmoe` that are not imported; None if unknown."""
        try:
            values = self.config["model"]["config"]
            try:
                return GPTConfig.from_dict(values)
            except ForeignCodeError:
                return GPTConfig.from_dict(without_parts(values))
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def layer(self, index: int) -> str:
        """Return the name of a MoE layer, with its block, both counted from 0."""
        counts = experts_per_layer(self.model) if self.model is not None else []
        blocks = [block for block, count in enumerate(counts) if count]
        return f"layer {index}" + (f" (block {blocks[index]})" if index < len(blocks) else "")

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric; None if it is not finite: an earlier one is not the result."""
        return finite_number(float(self.metrics[metric].iloc[-1])) if metric in self.metrics else None

    def fact(self, name: str, metric: str) -> float | None:
        """Return a fact of `summary.json`; without it, the last logged value of a metric."""
        value = finite_number(self.summary.get(name))
        return self.last(metric) if value is None else value

    def clock(self, name: str, steps: np.ndarray) -> np.ndarray | None:
        """Return the tokens, FLOPs or seconds (`CLOCKS`) up to each of `steps`, `[N]`; None if the run did not log them."""
        logged = self.metrics.get(CLOCKS[name])
        if logged is None:
            return None
        if logged.index[0] > 0:
            logged = pd.concat([pd.Series([0.0], [0.0]), logged])
        if len(logged) < 2:
            return None
        values: np.ndarray = make_interp_spline(logged.index, logged, k=1)(steps)
        return values


def finite_number(value: Any) -> float | None:
    """Return a finite number, and None for any other value."""
    return value if isinstance(value, int | float) and np.isfinite(value) else None


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read run folders, each once; paths of files, such as `report.html` in `runs/*`, are skipped."""
    folders: dict[str, Path] = {}  # by the resolved path
    for path in paths:
        folder = Path(os.path.abspath(os.path.expanduser(path)))
        if not folder.exists():
            raise SettingError(f"{path} does not exist; give the folder of a run (its trainer.default_root_dir)")
        if folder.is_file():
            continue
        if not any((folder / name).is_file() for name in (METRICS, SUMMARY, CONFIG)):
            raise SettingError(
                f"{path} is no run folder: it has no {METRICS}, {SUMMARY} or {CONFIG}; give a run's trainer.default_root_dir"
            )
        folders.setdefault(os.path.realpath(folder), folder)
    if not folders:
        raise SettingError(
            f"{', '.join(map(str, paths))}: no run folder among them; give a run's trainer.default_root_dir"
        )
    for parts in range(1, max(len(folder.parts) for folder in folders.values()) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders.values()]  # ends of the paths, short and unique
        if len(set(names)) == len(names):
            break
    runs = [_read(folder, name) for folder, name in zip(folders.values(), names, strict=True)]
    for index, run in enumerate(runs):
        run.key, run.colour = str(index), PALETTE[index % len(PALETTE)]
    return runs


def _read(folder: Path, name: str) -> Run:
    traces = {step: Trace(file) for step, file in recorded(folder).items()}
    run = Run(
        name,
        folder,
        metrics=_parsed(folder / METRICS, metrics_of, {}),
        loads=_parsed(folder / LOADS, loads_of, []),
        trace=traces[max(traces)] if traces else None,
        config=_parsed(folder / CONFIG, lambda text: _by_name(yaml.load(text, LOADER)), {}),
        summary=_parsed(folder / SUMMARY, lambda text: flattened(_by_name(json.loads(text))), {}),
        versions=_parsed(folder / VERSIONS, lambda text: _by_name(json.loads(text)), {}),
    )
    run.metrics |= _saturation(traces)
    dense = run.model is not None and run.model.moe is None
    known = {
        f"No {CONFIG}: no settings, and no names of blocks.": run.config,
        f"No {SUMMARY}: the run did not reach its end, or has not yet.": run.summary,
        f"No {VERSIONS}: no versions.": run.versions,
        f"No rows in {METRICS}: no curves. A run writes it unless trainer.logger is false.": run.metrics,
        "A dense model: it has no experts to show.": not dense,
        f"No {LOADS}: no heat maps of load. The callback ExpertLoad writes it while the run trains.": dense
        or run.loads,
        "No traces in routing/: no specialisation. A run writes one at every validation.": dense or run.trace,
    }
    run.notes = [note for note, is_known in known.items() if not is_known]
    for metric in ("train/loss", "val/loss", "train/grad_norm"):
        if metric in run.metrics and (count := int((~np.isfinite(run.metrics[metric])).sum())):
            run.notes.append(f"{metric} is not finite in {count:,} of {len(run.metrics[metric]):,} rows.")
    return run


def _saturation(traces: dict[int, Trace]) -> dict[str, pd.Series]:
    """Return the share of the choices at each validation that the last one has too, by layer, and its shuffled control.

    Validations of another text, as of another number of ranks, are left out.
    """
    if len(traces) < 2:
        return {}
    last = traces[max(traces)]
    text = last.read("tokens")
    rows = {
        step: saturation(trace, last) for step, trace in traces.items() if np.array_equal(trace.read("tokens"), text)
    }
    return {
        f"experts/{layer}/{name}": pd.Series({float(step): getattr(of[layer], field) for step, of in rows.items()})
        for layer in range(len(last.facts.blocks))
        for name, field in (("saturation", "value"), ("saturation_shuffled", "shuffled"))
    }


def _parsed(path: Path, parse: Callable[[str], T], default: T) -> T:
    """Return the result of `parse` for the text of a file; without a file, `default`."""
    if not path.exists():
        return default
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, LookupError, RecursionError, yaml.YAMLError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RunError(f"{path} is damaged ({reason}); repair it, or move it out of the run folder") from error


def metrics_of(text: str) -> dict[str, pd.Series]:
    """Return the columns of `metrics.csv` over steps taken; of rows of the same step, the last one with a value counts."""
    table = _cells(text, dtype=str)
    metrics = {}
    for name in table.columns.difference(["step", "epoch"], sort=False):
        rows = table.loc[table[name] != "", ["step", name]].to_numpy(object).astype(float)  # `nan` is a value
        if len(rows):
            series = pd.Series(rows[:, 1], rows[:, 0] + name.startswith(AFTER_STEP))
            metrics[name] = series[~series.index.duplicated(keep="last")].sort_index()
    return metrics


def loads_of(text: str) -> list[pd.DataFrame]:
    """Return `expert_load.csv` as assignments `[rows, experts]` of each layer, by the number of steps at each row."""
    table = _cells(text, dtype="float64", na_values="", usecols=lambda name: name not in ("tokens", "dropped"))
    loads = []
    for _, rows in table.groupby("moe_layer"):
        of_layer = rows.filter(like="expert_").dropna(axis=1)
        loads.append(pd.DataFrame(of_layer.to_numpy(), rows["step"].to_numpy() + 1))
    return loads


def _cells(text: str, **options: Any) -> pd.DataFrame:
    """Read CSV; a last line without its end is still being written."""
    complete = BytesIO(text[: text.rfind("\n") + 1].encode())
    return pd.read_csv(complete, **options, keep_default_na=False, index_col=False)


def _by_name(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise TypeError("no settings by name")
    return document
