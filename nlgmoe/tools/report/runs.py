"""Run folders. Missing or damaged files are recorded as issues, not raised."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nlgmoe.config import GPTConfig
from nlgmoe.eval.specialisation import FILE as SPECIALISATION
from nlgmoe.eval.specialisation import Specialisation
from nlgmoe.files import require_regular
from nlgmoe.model.counting import count_parameters
from nlgmoe.parts import PARTS, ForeignCodeError
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.run.folder import starts_of
from nlgmoe.tools.report.metrics import (
    LOADS,
    METRICS,
    ExpertLoads,
    Series,
    damaged_rows,
    read_expert_loads,
    read_metrics,
)
from nlgmoe.validation import RunError

CONFIG, SUMMARY, VERSIONS = "config.yaml", "summary.json", "versions.json"
SAMPLES = "samples.txt"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CLOCKS = {  # x axis -> metric
    "tokens": "train/tokens",
    "flops": "train/flops",
    "seconds": "time/elapsed",
}


@dataclass
class Run:
    """A run; a missing file is None or empty.

    Attributes:
        name: short name, unique in a page.
        path: the run folder.
        metrics: columns of `metrics.csv`.
        loads: `expert_load.csv`.
        specialisation: specialisation at the last validation.
        config: the resolved configuration of the last start, nested.
        summary: `summary.json`.
        versions: `versions.json`.
        issues: missing or damaged files and changed settings, a sentence each.
        samples: generated texts, `samples.txt`.
    """

    name: str
    path: Path
    metrics: dict[str, Series]
    loads: ExpertLoads | None
    specialisation: Specialisation | None
    config: dict[str, Any]
    summary: dict[str, Any]
    versions: dict[str, str]
    issues: list[str] = field(default_factory=list)
    samples: str = ""

    @cached_property
    def model(self) -> GPTConfig | None:
        """The model's configuration, without parts from outside `nlgmoe` that are not imported; None if unknown."""
        try:
            values = self.config["model"]["config"]
            try:
                return GPTConfig.from_dict(values)
            except ForeignCodeError:
                own = {name: value for name, value in values["moe"].items() if name not in PARTS}
                return GPTConfig.from_dict(values | {"moe": own})
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    @cached_property
    def blocks(self) -> list[int]:
        """The block of each MoE layer, counted from 1; empty if unknown."""
        counts = experts_per_layer(self.model) if self.model is not None else []
        return [block for block, count in enumerate(counts, 1) if count]

    def layer(self, index: int) -> str:
        """Return the name of a MoE layer."""
        return f"layer {index}" + (f" (block {self.blocks[index]})" if index < len(self.blocks) else "")

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric; None if it is not finite: an earlier one is not the result."""
        series = self.metrics.get(metric)
        return finite_number(float(series.values[-1])) if series is not None else None

    def mapping(self, fact: str) -> dict[str, Any]:
        """Return a mapping in the summary; empty if it is missing."""
        found = self.summary.get(fact)
        return found if isinstance(found, dict) else {}

    def parameters(self) -> tuple[int, int] | None:
        """Return the numbers of all and of active parameters."""
        total, active = (finite_number(self.summary.get(name)) for name in ("params_total", "params_active"))
        if total is not None and active is not None:
            return int(total), int(active)
        if self.model is None:
            return None
        named = self.config["model"]["config"].get("moe") or {}
        if any(named.get(part) and getattr(self.model.moe, part) is None for part in PARTS):
            return None  # a part that is not imported
        count = count_parameters(self.model)
        return count.total, count.active


def finite_number(value: Any) -> float | None:
    """Return a finite number, and None for any other value of a damaged file."""
    return value if isinstance(value, int | float) and np.isfinite(value) else None


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read run folders, each once."""
    found: dict[str, Path] = {}  # by where links lead
    for path in paths:
        folder = Path(os.path.abspath(os.path.expanduser(path)))
        if not folder.exists():
            raise RunError(f"{path} does not exist; give the folder of a run (its trainer.default_root_dir)")
        if not any((folder / name).is_file() for name in (METRICS, SUMMARY, CONFIG, SPECIALISATION)):
            raise RunError(
                f"{path} is no run folder: there is no {METRICS}, {SUMMARY} or {CONFIG} in it; give a run's "
                "trainer.default_root_dir"
            )
        found.setdefault(os.path.realpath(folder), folder)
    folders = list(found.values())
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: list[Path]) -> list[str]:
    """Return the shortest ends of the paths that are unique."""
    for parts in range(1, max((len(folder.parts) for folder in folders), default=1) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("folders are different")


def _read(folder: Path, name: str) -> Run:
    issues: list[str] = []
    config = _document(folder / CONFIG, "no settings, and no names of blocks", issues)
    summary = _document(folder / SUMMARY, "the run did not reach its end, or has not yet", issues)
    versions = _document(folder / VERSIONS, "no versions", issues)
    metrics = read_metrics(folder / METRICS)
    if not metrics:
        issues.append(f"No rows in {METRICS}: no curves. A run writes it unless trainer.logger is false.")
    if bad := damaged_rows(folder / METRICS):
        issues.append(f"{METRICS} has {bad:,} damaged rows: what cannot be read of them is left out.")
    issues += _changes(folder)
    for metric in ("train/loss", "val/loss", "train/grad_norm"):
        if metric in metrics and (count := int((~np.isfinite(metrics[metric].values)).sum())):
            issues.append(f"{metric} is not finite in {count:,} of {len(metrics[metric]):,} rows.")
    loads = read_expert_loads(folder / LOADS)
    run = Run(name, folder, metrics, loads, None, config, summary, versions, issues)
    run.samples = _samples(folder / SAMPLES, issues)
    if run.model is not None and run.model.moe is None:
        issues.append("A dense model: it has no experts to show.")
        return run
    if run.loads is None:
        issues.append(f"No {LOADS}: no heat maps of load. The callback ExpertLoad writes it while the run trains.")
    try:
        run.specialisation = Specialisation.load(folder)
    except FileNotFoundError:
        issues.append(f"No {SPECIALISATION}: no specialisation. A run writes it whenever it validates.")
    except ValueError as error:
        issues.append(f"{error}.")
    return run


def _samples(path: Path, issues: list[str]) -> str:
    """Read generated texts; empty if there are none."""
    try:
        require_regular(path, "replace it")
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        issues.append(f"{path.name} cannot be read ({' '.join(str(error).split())}): no generated text.")
        return ""


def _changes(folder: Path) -> list[str]:
    """List the settings and versions that changed between starts of a run."""
    found: list[str] = []
    before = None
    for step, file in starts_of(folder):
        try:
            require_regular(file, "replace it")
            text = file.read_text(encoding="utf-8")
            packages = json.loads(text.partition("\n")[0].removeprefix("#"))
            settings = flattened(yaml.load(text, LOADER))
            after = settings | {f"version of {name}": version for name, version in packages.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
            return [
                *found,
                f"starts/{file.name} cannot be read ({' '.join(str(error).split())}): no changes of settings.",
            ]
        names = [name for name in (before or after) | after if (before or after).get(name) != after.get(name)]
        changed = [f"{name} {(before or after).get(name)} -> {after.get(name)}" for name in names]
        if changed:
            found.append(f"From step {step:,} on: {', '.join(changed)}.")
        before = after
    return found


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names; lists of scalars are kept."""
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{name}" if prefix else str(name), item) for name, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(f"{prefix}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {prefix: value} if prefix else {}
    return {name: leaf for path, item in items for name, leaf in flattened(item, path).items()}


def _document(path: Path, without: str, issues: list[str]) -> dict[str, Any]:
    """Read a mapping from a JSON or YAML file; if that fails, add an issue and return an empty one."""
    try:
        require_regular(path, "replace it")
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if path.suffix == ".json" else yaml.load(text, LOADER)
    except FileNotFoundError:
        issues.append(f"No {path.name}: {without}.")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        issues.append(f"{path.name} cannot be read ({' '.join(str(error).split())}): {without}.")
        return {}
    if not isinstance(document, dict):
        issues.append(f"{path.name} does not hold settings by name: {without}.")
        return {}
    return document
