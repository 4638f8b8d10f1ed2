"""`nlgmoe inspect`: the cost of a configuration, predicted without building the model."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from nlgmoe.checkpoint.reading import read_document
from nlgmoe.config import GPTConfig
from nlgmoe.model.counting import count_parameters, flops_per_token
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.planner.cost import UTILISATION, memory_options
from nlgmoe.tools.planner.machine import Machine, Prediction, named_machine, predict, this_machine
from nlgmoe.tools.planner.table import Options, as_text, gpus_that_fit
from nlgmoe.tools.planner.topology import Precision, Topology
from nlgmoe.validation import SettingError, require


def inspect_config(
    files: list[str],
    gpus: int | None = None,
    expert_parallel: int | None = None,
    zero: int | None = None,
    micro_batch: int | None = None,
    global_batch: int | None = None,
    precision: str | None = None,
    activation_checkpointing: bool = False,
    hardware: str | None = None,
    utilisation: float = UTILISATION,
    simulate: bool = False,
    rank: int = 0,
    disk: float = 5.0,
    json: bool = False,
) -> None:
    """Predict a run's parameters, memory, communication and speed, and whether it fits, without building the model.

    Args:
        files: YAML files of train.py, later ones override earlier ones; or one folder of a checkpoint or run.
        gpus: ranks; default: the files' setting, and 1 if they leave it to the machine.
        expert_parallel: upper bound of the expert-parallel degree; default: the files' strategy.
        zero: ZeRO stage, 1 or 2; default: the files' strategy.
        micro_batch: sequences per rank and forward pass; default: data.micro_batch_size.
        global_batch: sequences per optimizer step; default: the files' setting.
        precision: Lightning's name, such as bf16-mixed; default: the files' setting, and bf16-mixed if they set neither
            trainer.precision nor trainer.accelerator.
        activation_checkpointing: recompute blocks in the backward pass, even if the files do not set it.
        hardware: v100-32, a100-40, a100-80, h100 or h200; default: this machine. Its accelerator's speed is predicted if it
            is one of these; a CPU's never.
        utilisation: achieved fraction of peak FLOP/s in matrix products; docs/planning.md documents the default.
        simulate: also run one rank's optimizer step without values, and compare; 30 to 60 seconds.
        rank: of --simulate: number of the rank.
        disk: of --simulate: GB/s of the file system of checkpoints, of all ranks together.
        json: print one JSON object instead of a table.
    """
    model, settings = read_settings(files)
    names = ("gpus", "expert_parallel_size", "zero_stage", "micro_batch_size", "global_batch_size")
    given = dict(zip(names, (gpus, expert_parallel, zero, micro_batch, global_batch), strict=True))
    given |= {"activation_checkpointing": activation_checkpointing or None}
    given |= {"precision": None if precision is None else _precision(precision)}  # type: ignore[dict-item]
    topology = layout(settings, {name: value for name, value in given.items() if value is not None})
    machine = _machine_of(settings, topology, hardware)
    prediction = predict(model, topology, machine, utilisation)
    options = [] if prediction.fits is not False else _options_of(model, topology, machine, utilisation)
    report = _rehearse(files, model, settings, topology, prediction, rank, disk) if simulate else {}
    if json:
        inputs = {"files": files, "hardware": machine.name, "utilisation": utilisation}
        print(json_format.dumps(as_json(model, topology, machine, prediction, options, inputs) | report, indent=2))
        return
    if hardware is not None and _of_trainer(settings, "accelerator", "auto") == "cpu":
        print(f"note                   the files set a CPU; speed and memory below are those of {hardware}")
    print(as_text(model, topology, machine, prediction, options, utilisation))
    if simulate:
        from nlgmoe.tools.planner.rehearsal import as_text as rehearsal_as_text

        print(rehearsal_as_text(report, topology))


def _rehearse(
    files: list[str],
    model: GPTConfig,
    settings: dict[str, Any],
    topology: Topology,
    prediction: Prediction,
    rank: int,
    disk: float,
) -> dict[str, Any]:
    """Simulate a step of one rank, and compare it with the prediction."""
    from nlgmoe.tools.planner import rehearsal  # imports DeepSpeed, which takes seconds

    require(disk > 0, f"--disk={disk} must be above 0 GB/s")
    simulated = rehearsal.simulate(files, settings, topology, rank)
    return rehearsal.as_json(model, topology, prediction, simulated, disk)


def _options_of(model: GPTConfig, topology: Topology, machine: Machine, utilisation: float) -> Options:
    """Return the predictions with each change that saves memory."""
    changes = memory_options(model, topology)
    return [(change, predict(model, replace(topology, **change), machine, utilisation)) for change in changes]


def _machine_of(settings: dict[str, Any], topology: Topology, hardware: str | None) -> Machine:
    """Return what each rank runs on: the machine that is named, or this one, with the run's GPUs of a node."""
    accelerator, nodes = _of_trainer(settings, "accelerator", "auto"), _of_trainer(settings, "num_nodes", 1)
    ranks = max(1, topology.gpus // nodes)
    machine = this_machine(accelerator, ranks) if hardware is None else named_machine(hardware)
    if machine.rates is None:
        return machine
    rates = replace(machine.rates, gpus_per_node=gpus_per_node(settings, machine.rates.gpus_per_node))
    return replace(machine, rates=rates)


def read_settings(paths: Sequence[str]) -> tuple[GPTConfig, dict[str, Any]]:
    """Read the model and train.py's settings; a checkpoint or a run's folder has no settings."""
    if len(paths) == 1 and (Path(paths[0]).is_dir() or paths[0].endswith(".ckpt")):
        from nlgmoe.checkpoint.run_checkpoints import find_checkpoint  # imports Lightning, which takes seconds

        return GPTConfig.from_dict(read_document(find_checkpoint(paths[0]))["model_config"]), {}
    # train.py's parser, for the same defaults and errors; its imports take seconds.
    from nlgmoe.experiment import parse_config

    settings = parse_config(paths)
    return GPTConfig.from_dict(settings["model"]["config"]), settings


def _of_trainer(settings: dict[str, Any], name: str, default: Any) -> Any:
    return settings.get("trainer", {}).get(name) or default


def layout(settings: dict[str, Any], given: dict[str, Any]) -> Topology:
    """Return the topology of train.py's `settings`, overridden by the options `given` on the command line."""
    trainer, data, module = (settings.get(part, {}) for part in ("trainer", "data", "model"))
    strategy = trainer.get("strategy") or "auto"
    name = strategy["class_path"] if isinstance(strategy, dict) else strategy
    init = (strategy.get("init_args") or {}) if isinstance(strategy, dict) else {}
    devices = _named_devices(trainer.get("devices"))
    # A model's file without a file of configs/hardware: Lightning's default, fp32, is not the precision of training.
    no_hardware = trainer.get("accelerator", "auto") == "auto"

    values: dict[str, Any] = {
        "gpus": (1 if devices is None else devices) * (trainer.get("num_nodes") or 1),
        "expert_parallel_size": init.get("expert_parallel_size", 1),
        "zero_stage": init.get("stage", 0),
        "offload_optimizer": init.get("offload_optimizer", False),
        "seq_len": data.get("seq_len"),
        "micro_batch_size": data.get("micro_batch_size", 1),
        "activation_checkpointing": module.get("activation_checkpointing", False),
        "loss_chunk_size": module.get("loss_chunk_size", 1024),
        "muon": bool((module.get("optimizer") or {}).get("muon")),
        "precision": _precision(trainer.get("precision") or ("bf16-mixed" if no_hardware else "32-true")),
    } | given
    if "gpus" in given and "expert_parallel_size" not in given:
        # Files for a larger cluster than --gpus: limit the strategy's bound.
        values["expert_parallel_size"] = min(values["expert_parallel_size"], given["gpus"])
    accumulation = trainer.get("accumulate_grad_batches") or 1
    global_batch = data.get("global_batch_size") or values["micro_batch_size"] * values["gpus"] * accumulation
    values.setdefault("global_batch_size", global_batch)
    # --gpus without a strategy: assume this project's strategy. For `devices` in the files, "auto" is ddp, as in train.py.
    assumed = name == "auto" and given.get("gpus", 1) > 1
    engine = "deepspeed" in name.lower() or "ExpertParallel" in name or assumed
    values["deepspeed"] = engine or values["zero_stage"] > 0 or values["expert_parallel_size"] > 1
    values["zero_stage"] = max(values["zero_stage"], int(values["deepspeed"]))  # the strategy takes 0 as 1
    return Topology(**values)


def gpus_per_node(settings: dict[str, Any], usual: int) -> int:
    """Return the GPUs that are joined in a node: the devices of each of several nodes, else `usual` or all that one has."""
    trainer = settings.get("trainer", {})
    devices, several = _named_devices(trainer.get("devices")), (trainer.get("num_nodes") or 1) > 1
    return usual if devices is None else devices if several else max(devices, usual)


def _named_devices(devices: Any) -> int | None:
    """Return the ranks per node of Lightning's `devices`: a number, indices, or text of either; None for "auto" and -1."""
    words = devices if isinstance(devices, list) else str(devices or "auto").strip("[] ").rstrip(",").split(",")
    if words in (["auto"], ["-1"], [-1]):
        return None
    if not all(str(word).strip().isdigit() for word in words):
        raise SettingError(f"trainer.devices={devices} is no number of GPUs and no list of indices; correct it")
    return len(words) if isinstance(devices, list) or "," in str(devices) else int(words[0])


def _precision(name: Any) -> Precision:
    """Expand Lightning's short names of precisions."""
    precision: Precision = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(str(name), str(name))  # type: ignore[assignment]
    if precision not in get_args(Precision):
        raise SettingError(
            f"precision={name} is not supported by the cost model; choose one of {', '.join(get_args(Precision))}"
        )
    return precision


def as_json(
    config: GPTConfig,
    topology: Topology,
    machine: Machine,
    prediction: Prediction,
    options: Options,
    inputs: dict[str, Any],
) -> dict[str, Any]:
    """Return all results, in bytes, seconds, FLOPs and counts; null where the machine's memory or rates are unknown."""
    count, memory, communication, cost = (
        count_parameters(config),
        prediction.memory,
        prediction.communication,
        prediction.cost,
    )
    return {
        "inputs": inputs | {"model": config.to_dict(), "topology": asdict(topology)},
        "params_total": count.total,
        "params_active": count.active,
        "params": asdict(count),
        "flops_per_token": flops_per_token(config, topology.length(config)),
        "experts_per_layer": experts_per_layer(config),
        "expert_parallel_degrees": topology.degrees(config),
        "memory": asdict(memory)
        | {"activations": memory.activations, "total": memory.total, "available": machine.memory},
        "communication": asdict(communication) | {"total": communication.total},
        "step_seconds": cost and cost.time.total,
        "step_seconds_by_part": cost and asdict(cost.time),
        "samples_per_second": cost and cost.samples_per_second,
        "tokens_per_second": cost and cost.tokens_per_second,
        "fits": prediction.fits,
        "options": [
            {
                "changes": change,
                "memory_total": changed.memory.total,
                "tokens_per_second": changed.cost and changed.cost.tokens_per_second,
                "fits_on": gpus_that_fit(changed.memory),
            }
            for change, changed in options
        ],
    }
