"""`nlgmoe inspect`: what a configuration costs, before anything is built or bought."""

from __future__ import annotations

import json as json_format
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from nlgmoe.checkpoint.folder import read_document
from nlgmoe.config import GPTConfig
from nlgmoe.monitoring.hardware import hardware as find_hardware
from nlgmoe.tools.planner.cost import UTILISATION, estimate
from nlgmoe.tools.planner.fitting import suggestions
from nlgmoe.tools.planner.inspect_report import as_json, as_text
from nlgmoe.tools.planner.topology import Precision, Topology


def inspect_config(
    files: list[str],
    gpus: int | None = None,
    expert_parallel: int | None = None,
    zero: int | None = None,
    micro_batch: int | None = None,
    global_batch: int | None = None,
    precision: str | None = None,
    activation_checkpointing: bool = False,
    hardware: str = "a100-80",
    utilisation: float = UTILISATION,
    json: bool = False,
) -> None:
    """Predict parameters, memory, communication and speed of a run, and whether it fits; builds and downloads nothing.

    Args:
        files: YAML files as train.py takes them, later ones override earlier ones; or one checkpoint folder.
        gpus: ranks; by default what the files say, and 1 where they leave it to the machine.
        expert_parallel: upper bound of the expert-parallel degree; by default what the files' strategy says.
        zero: ZeRO stage, 0 to 2; by default what the files' strategy says.
        micro_batch: sequences per rank and forward pass; by default data.micro_batch_size.
        global_batch: sequences per optimizer step; by default what the files say.
        precision: Lightning's name, such as bf16-mixed; by default what the files say, and bf16-mixed where they leave both
            trainer.precision and trainer.accelerator open.
        activation_checkpointing: recompute blocks in the backward pass, whatever the files say.
        hardware: v100-32, a100-40, a100-80, h100 or h200.
        utilisation: share of the peak FLOP/s that matrix products reach; docs/scaling.md says where the default is from.
        json: print one JSON object instead of a table.

    Raises:
        ValueError: the files or the settings do not make a run; the message says what to change.
    """
    gpu = find_hardware(hardware)
    model, settings = read_settings(files)
    given = {
        "gpus": gpus,
        "expert_parallel_size": expert_parallel,
        "zero_stage": zero,
        "micro_batch_size": micro_batch,
        "global_batch_size": global_batch,
        "precision": None if precision is None else _precision(precision),
        "activation_checkpointing": activation_checkpointing or None,
    }
    topology = layout(settings, {name: value for name, value in given.items() if value is not None})
    cost = estimate(model, topology, gpu, utilisation)
    ways = [] if cost.fits else suggestions(model, topology, gpu, utilisation)
    if settings.get("trainer", {}).get("accelerator") == "cpu" and not json:
        print(f"note                   the files name a CPU; speed and memory below are those of {hardware}")
    inputs = {"files": files, "hardware": hardware, "utilisation": utilisation}
    if json:
        print(json_format.dumps(as_json(model, topology, gpu, cost, ways, inputs), indent=2))
    else:
        print(as_text(model, topology, gpu, cost, ways, inputs))


def read_settings(paths: Sequence[str]) -> tuple[GPTConfig, dict[str, Any]]:
    """The model, and train.py's settings; a checkpoint folder has no settings, so they are empty.

    Raises:
        ValueError: a file or folder cannot be read.
    """
    if len(paths) == 1 and Path(paths[0]).is_dir():
        return GPTConfig.from_dict(read_document(paths[0])["model_config"]), {}
    # train.py's own parser, so that defaults and complaints are the same; it costs seconds of imports.
    from nlgmoe.experiment import parse_config

    settings = parse_config(paths)
    return GPTConfig.from_dict(settings["model"]["config"]), settings


def layout(settings: dict[str, Any], given: dict[str, Any]) -> Topology:
    """The topology of train.py's `settings`, with what was `given` on the command line in place of theirs.

    Raises:
        ValueError: the numbers do not fit together, or the precision is one that the cost model does not know.
    """
    trainer, data, module = (settings.get(part, {}) for part in ("trainer", "data", "model"))
    strategy = trainer.get("strategy") or "auto"
    named = strategy["class_path"] if isinstance(strategy, dict) else strategy
    init = (strategy.get("init_args") or {}) if isinstance(strategy, dict) else {}
    short = re.fullmatch(r"deepspeed(?:_stage_(\d))?(_offload)?", named)  # Lightning's names; a bare one is its stage 2
    # A model's file without an overlay for the machine: Lightning's fp32 is not what it would be trained in.
    open_machine = trainer.get("accelerator", "auto") == "auto"

    values: dict[str, Any] = {
        "gpus": _devices(trainer.get("devices")) * (trainer.get("num_nodes") or 1),
        "expert_parallel_size": init.get("expert_parallel_size", 1),
        "zero_stage": init.get("stage", int(short[1] or 2) if short else 0),
        "offload_optimizer": init.get("offload_optimizer", bool(short and short[2])),
        "micro_batch_size": data.get("micro_batch_size", 1),
        "activation_checkpointing": module.get("activation_checkpointing", False),
        "loss_chunk_size": module.get("loss_chunk_size", 1024),
        "precision": _precision(trainer.get("precision") or ("bf16-mixed" if open_machine else "32-true")),
    } | given
    if "gpus" in given and "expert_parallel_size" not in given:
        # Files for a larger cluster, looked at on a smaller one: the strategy's bound, as far as there are ranks.
        values["expert_parallel_size"] = min(values["expert_parallel_size"], given["gpus"])
    at_once = values["micro_batch_size"] * values["gpus"]
    whole = data.get("global_batch_size") or at_once * (trainer.get("accumulate_grad_batches") or 1)
    values.setdefault("global_batch_size", whole)
    # Several GPUs and no word on the strategy: the one of this project is meant, not Lightning's choice.
    engine = "deepspeed" in named.lower() or "ExpertParallel" in named or (named == "auto" and values["gpus"] > 1)
    values["deepspeed"] = engine or values["zero_stage"] > 0 or values["expert_parallel_size"] > 1
    return Topology(**values)


def _devices(devices: Any) -> int:
    """Ranks of a node by Lightning's `devices`: a number, a list of indices, or text of either; "auto" and -1 mean one here."""
    text = str(devices if devices is not None else "auto").strip("[] ")
    if "," in text:
        return len([index for index in text.split(",") if index.strip()])
    if isinstance(devices, list):
        return len(devices)
    return int(text) if text.isdigit() else 1


def _precision(name: Any) -> Precision:
    """Lightning's name of a precision in its long form."""
    long = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(str(name), str(name))
    for known in get_args(Precision):
        if long == known:
            return known
    raise ValueError(f"precision={name}: the cost model knows {', '.join(get_args(Precision))}")
