"""A candidate, from a class_path or a YAML file; and what is known of it before a run: properties, memory, costs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gate.sides import BASELINES, Baseline, Side
from benchmarks.reproduce.scale import Scale
from benchmarks.step import whole_step
from benchmarks.timing import interleaved
from nlgmoe.cli.given_settings import find_class
from nlgmoe.cli.yaml_places import ConfigLoader
from nlgmoe.device import available_memory
from nlgmoe.experiment import load_config, parse_config
from nlgmoe.model.counting import count_parameters, flops_per_token
from nlgmoe.parts import AttentionConfig, ExpertConfig, RouterConfig
from nlgmoe.process import keep_freed_memory
from nlgmoe.run.folder import flattened
from nlgmoe.tools.check.own import own_layer
from nlgmoe.tools.check.properties import check_layer
from nlgmoe.tools.planner.memory import memory_of
from nlgmoe.tools.planner.topology import layout
from nlgmoe.validation import RunError, SettingError, require

PLACES = {RouterConfig: ("moe", "router"), ExpertConfig: ("moe", "expert"), AttentionConfig: ("attention",)}
FREE = ("model.config.", "model.optimizer.", "model.schedule.cooldown_tokens")  # settings of an overlay
HELD = ("vocab_size", "seq_len", "moe.eval_capacity_factor", "moe.eval_token_dropping")
PROCESS = 600_000_000  # bytes of a run's process beside the model: 0.68 GB at most with the baseline's
ROUNDS, WARM_UP = 30, 15  # timed steps; oneDNN compiles a kernel for each number of rows, in the first ones


def read_candidate(text: str, name: str | None, scale: Scale, base: Baseline) -> Side:
    """Return the candidate that a class_path or a YAML file names.

    Raises:
        SettingError: it is none, or sets what the gate holds fixed.
    """
    is_file = text.endswith((".yaml", ".yml"))
    if is_file:
        own = Path(text).stem
        _check_fixed(flattened(parse_config([*base.files, text])), base)
        overlay = json.dumps(yaml.load(Path(text).read_text(), Loader=ConfigLoader))  # later edits change no run
    else:
        kind, own = find_class(text) if "." in text else None, text.rpartition(".")[2]
        bases = [base for base in PLACES if inspect.isclass(kind) and issubclass(kind, base)]
        require(bool(bases), f"{text} is no RouterConfig, ExpertConfig or AttentionConfig, and no YAML file")
        overlay = _at(PLACES[bases[0]], {"class_path": text})
    name = name or own
    require(
        name not in BASELINES and name.replace("-", "_").replace(".", "_").isidentifier(),
        f"--name={name}: give another one, of letters, digits, -, . and _",
    )
    side = Side(name, scale, base, (overlay,))
    load_config([*base.files, text if is_file else overlay])  # checks all
    return side


def _at(place: tuple[str, ...], value: Any) -> str:
    for name in reversed(("model", "config", *place)):
        value = {name: value}
    return json.dumps(value)


def _check_fixed(settings: dict[str, Any], base: Baseline) -> None:
    """Check that settings differ from the baseline's only where they may; those of the model first, since others follow them."""
    baseline = flattened(parse_config(list(base.files))) | {"config": settings["config"]}  # its list of files
    for name in sorted(
        {*settings, *baseline}, key=lambda name: (name not in settings, not name.startswith("model."), name)
    ):
        # without experts there are no settings of their evaluation
        free = name.startswith(FREE) and (name.removeprefix("model.config.") not in HELD or name not in settings)
        require(
            free or (name in settings and name in baseline and settings[name] == baseline[name]),
            f"{name}={settings.get(name)}: the gate holds it fixed; an overlay sets model.config, but for {', '.join(HELD)}, "
            "model.optimizer and model.schedule.cooldown_tokens",
        )


def check(candidate: Side, baseline: Side) -> str:
    """Test the properties of `nlgmoe check` on the candidate's layers, and return a line about them.

    Raises:
        RunError: one fails.
    """
    config, verdicts = candidate.config, []
    if config == baseline.config:
        return "properties: left out, since the model is the baseline's"
    if config.moe is None:
        return "properties: left out, since the model has no MoE layer"
    for result in check_layer(own_layer(config, candidate.name)):
        if result.verdict == "fail":
            raise RunError(
                f"{candidate.name} fails `nlgmoe check`: {result.property}: {result.reason} (docs/extending.md)"
            )
        verdicts.append(result.verdict)
    return f"properties: {verdicts.count('pass')} pass, {verdicts.count('not applicable')} are not applicable"


def memory(side: Side, jobs: int) -> str:
    """Predict the memory of the runs at a time, and return a line about it.

    Raises:
        SettingError: the machine has less.
    """
    try:
        model = memory_of(side.config, layout(side.settings, {})).total
    except SettingError:  # activations of the user's own part are not known
        model = 16 * count_parameters(side.config).total  # weights, gradients, moments
    needed, available = jobs * (model + PROCESS), available_memory()
    text = f"{needed / 1e9:.1f} GB predicted for {jobs} runs of {side.name}, {(available or 0) / 1e9:.1f} GB available"
    require(available is None or needed <= available, f"--jobs={jobs}: {text}; use fewer, or a smaller model")
    return f"memory: {text}"


def costs(candidate: Side, baseline: Side, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure what a token of the candidate costs, as multiples of the baseline's: `flops`, `seconds`; and both in units."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as train.py does
    sides = {"candidate": candidate, "baseline": baseline}
    flops = {name: flops_per_token(side.config) for name, side in sides.items()}
    seconds = interleaved(
        {name: whole_step(side.files(side.scale.steps, 1)) for name, side in sides.items()}, rounds, WARM_UP
    )
    ratios = {kind: value["candidate"] / value["baseline"] for kind, value in (("flops", flops), ("seconds", seconds))}
    return {**ratios, "flops_per_token": flops, "step_seconds": seconds, "rounds": rounds}
