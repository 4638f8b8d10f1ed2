"""What a run folder says of its run. Whatever is missing is named, and does without."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nlgmoe.config import GPTConfig
from nlgmoe.eval.specialisation import FILE as SPECIALISATION
from nlgmoe.eval.specialisation import Specialisation
from nlgmoe.files import require_regular
from nlgmoe.model.counting import count_parameters
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.report.metrics import LOADS, METRICS, Loads, Series, damaged_rows, read_loads, read_metrics

CONFIG, SUMMARY, VERSIONS, STARTS = "config.yaml", "summary.json", "versions.json", "starts.json"
CLOCKS = {  # what charts are drawn over -> the metric that says it at a step
    "tokens": "train/tokens",
    "flops": "train/flops",
    "seconds": "time/elapsed",
}


@dataclass
class Run:
    """One run.

    Attributes:
        name: short, another for each run of a page.
        path: the run folder.
        metrics: every column of `metrics.csv`.
        loads: of each expert over time; None: not there.
        specialisation: of the last validation; None: not there.
        config: the resolved configuration, nested; empty: not there.
        summary: empty: not there.
        versions: empty: not there.
        notes: what is missing or odd, a sentence each.
    """

    name: str
    path: Path
    metrics: dict[str, Series]
    loads: Loads | None
    specialisation: Specialisation | None
    config: dict[str, Any]
    summary: dict[str, Any]
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def model(self) -> GPTConfig | None:
        """The model's shape, if it is known."""
        try:
            return GPTConfig.from_dict(self.config["model"]["config"])
        except (KeyError, TypeError, ValueError):
            return None

    @cached_property
    def blocks(self) -> list[int]:
        """Of each MoE layer the block that it is in, counted from 1; empty if that is not known."""
        counts = experts_per_layer(self.model) if self.model is not None else []
        return [block for block, count in enumerate(counts, 1) if count]

    def layer(self, index: int) -> str:
        """What a MoE layer is called on the page."""
        return f"layer {index}" + (f" (block {self.blocks[index]})" if index < len(self.blocks) else "")

    def last(self, metric: str) -> float | None:
        """The last finite value of a metric."""
        series = self.metrics.get(metric)
        finite = series.values[np.isfinite(series.values)] if series is not None else []
        return float(finite[-1]) if len(finite) else None

    def mapping(self, fact: str) -> dict[str, Any]:
        """What the summary says of a fact that has parts; empty if it does not."""
        found = self.summary.get(fact)
        return found if isinstance(found, dict) else {}

    def parameters(self) -> tuple[int, int] | None:
        """All, and those that a token uses."""
        total, active = (finite_number(self.summary.get(name)) for name in ("params_total", "params_active"))
        if total is not None and active is not None:
            return int(total), int(active)
        if self.model is None:
            return None
        count = count_parameters(self.model)
        return count.total, count.active


def finite_number(value: Any) -> float | None:
    """A finite number as it is; None for anything else that a damaged file may hold."""
    return value if isinstance(value, int | float) and np.isfinite(value) else None


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read run folders, each once.

    Raises:
        ValueError: one of them is none.
    """
    folders = list(dict.fromkeys(Path(os.path.abspath(Path(path).expanduser())) for path in paths))
    given = {Path(os.path.abspath(Path(path).expanduser())): path for path in paths}
    for folder in folders:
        if not folder.exists():
            raise ValueError(
                f"run={given[folder]} does not exist; give the folder of a run (its trainer.default_root_dir)"
            )
        if not any((folder / name).is_file() for name in (METRICS, SUMMARY, CONFIG)):
            raise ValueError(
                f"run={given[folder]} is no run folder: there is no {METRICS}, {SUMMARY} or {CONFIG} in it; give a run's "
                "trainer.default_root_dir"
            )
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: list[Path]) -> list[str]:
    """The ends of their paths, as short as tells them apart."""
    for parts in range(1, max((len(folder.parts) for folder in folders), default=1) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("folders are different")


def _read(folder: Path, name: str) -> Run:
    notes: list[str] = []
    config = _document(folder / CONFIG, "no settings, and no names of blocks", notes)
    summary = _document(folder / SUMMARY, "the run did not reach its end, or has not yet", notes)
    versions = _document(folder / VERSIONS, "no versions", notes)
    metrics = read_metrics(folder / METRICS)
    if not metrics:
        notes.append(f"No rows in {METRICS}: no curves. A run writes it unless trainer.logger is false.")
    if bad := damaged_rows(folder / METRICS):
        notes.append(f"{METRICS} has {bad:,} damaged rows: what cannot be read of them is left out.")
    notes += _changes(folder)
    for metric in ("train/loss", "train/grad_norm"):
        if metric in metrics and (count := int((~np.isfinite(metrics[metric].values)).sum())):
            notes.append(f"{metric} is not finite in {count:,} of {len(metrics[metric]):,} rows.")
    run = Run(name, folder, metrics, read_loads(folder / LOADS), None, config, summary, versions, notes)
    if run.model is not None and run.model.moe is None:
        notes.append("A dense model: it has no experts to show.")
        return run
    if run.loads is None:
        notes.append(f"No {LOADS}: no heat maps of load. The callback ExpertLoad writes it while the run trains.")
    try:
        run.specialisation = Specialisation.load(folder)
    except FileNotFoundError:
        notes.append(f"No {SPECIALISATION}: no specialisation. A run writes it whenever it validates.")
    except ValueError as error:
        notes.append(f"{error}.")
    return run


def _changes(folder: Path) -> list[str]:
    """What each start of a run had other than the start before it."""
    try:
        require_regular(folder / STARTS, "replace it")
        starts = json.loads((folder / STARTS).read_text())
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        settings = [flattened(yaml.load((folder / start["config"]).read_text(), loader)) for start in starts]
        found = []
        for (before, after), (old, new) in zip(pairwise(starts), pairwise(settings), strict=True):
            made = [{f"version of {name}": text for name, text in one["versions"].items()} for one in (before, after)]
            old, new = old | made[0], new | made[1]
            changed = [
                f"{name} {old.get(name)} -> {new.get(name)}" for name in old | new if old.get(name) != new.get(name)
            ]
            if changed:
                found.append(f"From step {after['step']:,} on: {', '.join(changed)}.")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        return [f"{STARTS} cannot be read ({' '.join(str(error).split())}): no changes of settings."]
    return found


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; lists of plain values stay whole."""
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{name}" if prefix else str(name), item) for name, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(f"{prefix}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {prefix: value} if prefix else {}
    return {name: leaf for path, item in items for name, leaf in flattened(item, path).items()}


def _document(path: Path, without: str, notes: list[str]) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping; empty, with a note, if it does not."""
    try:
        require_regular(path, "replace it")
        text = path.read_text()
        document = (
            json.loads(text)
            if path.suffix == ".json"
            else yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        )
    except FileNotFoundError:
        notes.append(f"No {path.name}: {without}.")
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read ({' '.join(str(error).split())}): {without}.")
        return {}
    if not isinstance(document, dict):
        notes.append(f"{path.name} does not hold settings by name: {without}.")
        return {}
    return document
