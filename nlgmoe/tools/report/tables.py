"""HTML tables of a page: results, settings, and differences between runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any

import yaml

from nlgmoe.tools.report.drawing import run_colour
from nlgmoe.tools.report.runs import Run, finite_number, flattened

UNKNOWN = "–"
SAME_TOKENS = ("tokenizer", "corpus", "max_eval_windows", "mask_eod_loss")  # settings `data.*` of what is evaluated
OF_BATCHES = ("data.eval_micro_batch_size", "trainer.devices", "trainer.num_nodes")  # a batch of all ranks
PER_RUN = ("trainer.default_root_dir", "ckpt_path")  # settings that differ between all runs


def summary(runs: Sequence[Run]) -> str:
    """Return the results: a row per fact, a column per run."""
    domains = list(dict.fromkeys(name for run in runs for name in run.mapping("bits_per_byte") if name != "all"))
    facts: dict[str, Callable[[Run], str]] = {
        "parameters, active for a token": lambda run: ", ".join(_count(value) for value in run.parameters() or (None,)),
        "experts of each MoE layer": _experts,
        "steps, tokens": lambda run: f"{_whole(_steps(run))}, {_count(_fact(run, 'tokens', 'train/tokens'))}",
        "training loss (nats per token)": lambda run: _decimal(_fact(run, "train_loss", "train/loss")),
        "validation loss (nats per token)": lambda run: _decimal(_fact(run, "val_loss", "val/loss")),
        "bits per byte of validation text": lambda run: _decimal(_bits(run, "all")),
        **{f"bits per byte: {name}": partial(lambda name, run: _decimal(_bits(run, name)), name) for name in domains},
        "speed (tokens/s)": lambda run: _whole(_fact(run, "tokens_per_second", "train/tokens_per_second")),
        "peak memory (GB)": lambda run: _decimal(_fact(run, "peak_memory_bytes", "memory/process_bytes"), 1e9),
        "time": lambda run: _duration(_fact(run, "wall_seconds", "time/elapsed")),
        "of it validation": partial(_share_of_time, "validation_seconds"),
        "of it between steps otherwise: data, texts, reports, checkpoints": _between_steps,
        "skipped steps": lambda run: _whole(_fact(run, "skipped_steps", "train/skipped_steps")),
        "nlgmoe, torch": lambda run: ", ".join(_versions(run).get(name, UNKNOWN) for name in ("nlgmoe", "torch")),
        "reached its end": lambda run: "yes" if run.summary else "no, or not yet",
    }
    return _by_run(runs, [(name, [fact(run) for run in runs]) for name, fact in facts.items()], "facts")


def versions(runs: Sequence[Run]) -> str:
    """Return the package versions of each run, a row per package."""
    found = [_versions(run) for run in runs]
    packages = list(dict.fromkeys(package for version in found for package in version))
    return _by_run(runs, [(package, [version.get(package, UNKNOWN) for version in found]) for package in packages])


def differences(runs: Sequence[Run]) -> str:
    """Return the settings that differ between runs, or a sentence if there are none."""
    flat = [flattened(run.config) for run in runs]
    names = [name for name in dict.fromkeys(name for settings in flat for name in settings) if name not in PER_RUN]
    rows = [(name, [settings.get(name, UNKNOWN) for settings in flat]) for name in names]
    rows = [(name, values) for name, values in rows if any(value != values[0] for value in values)]
    return _by_run(runs, rows) if rows else "<p>All runs have the same settings.</p>"


def other_tokens(runs: Sequence[Run]) -> str:
    """Return a note that validation losses may be of other tokens (a tokenizer has several paths); empty if they are not."""
    configs = [run.config for run in runs]
    found = [_evaluated(config, data) for config in configs if isinstance(data := config.get("data"), dict)]
    cut = any(of_run["data.max_eval_windows"] is not None for of_run in found)  # in sequences
    limited = any(of_run["trainer.limit_val_batches"] is not None for of_run in found)  # in batches of a rank
    counted = {"model.config.seq_len": cut or limited, **dict.fromkeys(OF_BATCHES, limited)}
    names = [
        name
        for name in dict.fromkeys(name for of_run in found for name in of_run)
        if counted.get(name, True) and len({str(of_run[name]) for of_run in found}) > 1
    ]
    if not names:
        return ""
    remedy = "; compare bits per byte" if names == ["data.tokenizer"] else ""
    if remedy and cut:
        remedy += ", best without data.max_eval_windows, which cuts the text at another place for each tokenizer"
    return (
        f'<p class="notes">Losses per token of these runs may not be comparable: {" and ".join(names)} '
        f"differ{'s' * (len(names) == 1)}{remedy}.</p>"
    )


def _evaluated(config: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that determine which tokens are evaluated, by name."""
    flat = flattened(config)
    limit = flat.get("trainer.limit_val_batches")
    return {
        **{f"data.{name}": data.get(name) for name in SAME_TOKENS},
        "model.config.seq_len": data.get("seq_len", flat.get("model.config.seq_len")),
        "trainer.limit_val_batches": None if isinstance(limit, float) and limit == 1 else limit,
        "data.eval_micro_batch_size": data.get("eval_micro_batch_size") or data.get("micro_batch_size"),
        **{name: flat.get(name) for name in OF_BATCHES[1:]},
    }


def settings(runs: Sequence[Run]) -> str:
    """Return the full configuration of each run, folded."""
    return "\n".join(
        _folded(number, run, "all settings", yaml.safe_dump(run.config, sort_keys=False) if run.config else "not known")
        for number, run in enumerate(runs)
    )


def samples(runs: Sequence[Run]) -> str:
    """Return the generated texts of each run that has them, folded; empty if none has."""
    parts = [_folded(number, run, "texts by step", run.samples) for number, run in enumerate(runs) if run.samples]
    return f"<section><h2>Generated text</h2>{''.join(parts)}</section>" if parts else ""


def _folded(number: int, run: Run, title: str, text: str) -> str:
    return f"<details><summary>{run_label(number, run)}: {title}</summary><pre>{escape(text)}</pre></details>"


def issue_list(runs: Sequence[Run]) -> str:
    """Return the issues of all runs as a list; empty if there are none."""
    parts = [
        f"<li>{run_label(number, run)}: {escape(issue)}</li>" for number, run in enumerate(runs) for issue in run.issues
    ]
    return f'<ul class="notes">{"".join(parts)}</ul>' if parts else ""


def run_label(number: int, run: Run) -> str:
    """Return a run's name with its colour."""
    return f'<span class="run" style="--colour: {run_colour(number)}" title="{escape(str(run.path))}">{escape(run.name)}</span>'


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _by_run(runs: Sequence[Run], rows: Sequence[tuple[str, Sequence[Any]]], kind: str = "settings") -> str:
    head = "<th></th>" + "".join(f"<th>{run_label(number, run)}</th>" for number, run in enumerate(runs))
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(_shown(value))}</td>' for value in values)}</tr>"
        for name, values in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _share_of_time(name: str, run: Run) -> str:
    return UNKNOWN if (share := _share(run, name)) is None else f"{share:.1%}"


def _between_steps(run: Run) -> str:
    shares = [_share(run, name) for name in ("step_seconds", "validation_seconds")]
    return UNKNOWN if None in shares else f"{1 - sum(filter(None, shares)):.1%}"


def _share(run: Run, name: str) -> float | None:
    """Part of the run's time that a time of its summary is."""
    wall, seconds = (finite_number(run.summary.get(each)) for each in ("wall_seconds", name))
    return None if not wall or seconds is None else seconds / wall


def _experts(run: Run) -> str:
    if run.model is None or run.model.moe is None:
        return UNKNOWN if run.model is None else "none"
    experts = run.model.moe.num_experts
    return str(experts) if isinstance(experts, int) else "/".join(map(str, experts))


def _versions(run: Run) -> dict[str, str]:
    return run.versions or run.mapping("versions")


def _fact(run: Run, fact: str, metric: str) -> float | None:
    """Return a fact of `summary.json`; without it, the last logged value of a metric."""
    found = finite_number(run.summary.get(fact))
    return found if found is not None else run.last(metric)


def _bits(run: Run, domain: str) -> float | None:
    found = finite_number(run.mapping("bits_per_byte").get(domain))
    return found if found is not None else run.last("val/bits_per_byte" + ("" if domain == "all" else f"/{domain}"))


def _steps(run: Run) -> float | None:
    if (found := finite_number(run.summary.get("steps"))) is not None:
        return found
    return float(run.metrics["train/loss"].steps[-1]) + 1 if "train/loss" in run.metrics else None


def _count(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:,.0f}"


def _whole(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _decimal(value: float | None, unit: float = 1) -> str:
    return UNKNOWN if value is None else f"{value / unit:.3f}"
