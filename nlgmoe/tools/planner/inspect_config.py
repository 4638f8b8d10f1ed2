"""`nlgmoe inspect`: the cost of a configuration, predicted without building the model."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from nlgmoe.checkpoint.folder import read_document
from nlgmoe.config import GPTConfig
from nlgmoe.model.counting import count_parameters, flops_per_token
from nlgmoe.monitoring.hardware import HARDWARE, RESERVED, Hardware
from nlgmoe.monitoring.hardware import hardware as find_hardware
from nlgmoe.pyramid import experts_per_layer, moe_blocks
from nlgmoe.tools.planner.cost import UTILISATION, Cost, Parts, estimate, fits_on, memory_options
from nlgmoe.tools.planner.topology import Precision, Topology
from nlgmoe.validation import SettingError

OPTIONS = {
    "zero_stage": "--zero",
    "expert_parallel_size": "--expert-parallel",
    "micro_batch_size": "--micro-batch",
    "activation_checkpointing": "--activation-checkpointing",
}
"""The command-line option for each setting that `memory_options` changes."""

Options = list[tuple[dict[str, Any], Cost]]  # changes of the topology, and the cost with them


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
        hardware: v100-32, a100-40, a100-80, h100 or h200.
        utilisation: achieved fraction of peak FLOP/s in matrix products; docs/planning.md documents the default.
        json: print one JSON object instead of a table.
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
    gpu = replace(gpu, gpus_per_node=gpus_per_node(settings, gpu.gpus_per_node))
    cost = estimate(model, topology, gpu, utilisation)
    changes = [] if cost.fits else memory_options(model, topology)
    options = [(change, estimate(model, replace(topology, **change), gpu, utilisation)) for change in changes]
    inputs = {"files": files, "hardware": hardware, "utilisation": utilisation}
    if json:
        print(json_format.dumps(as_json(model, topology, gpu, cost, options, inputs), indent=2))
        return
    if settings.get("trainer", {}).get("accelerator") == "cpu":
        print(f"note                   the files set a CPU; speed and memory below are those of {hardware}")
    print(as_text(model, topology, gpu, cost, options, inputs))


def read_settings(paths: Sequence[str]) -> tuple[GPTConfig, dict[str, Any]]:
    """Read the model and train.py's settings; a checkpoint or a run's folder has no settings."""
    if len(paths) == 1 and (Path(paths[0]).is_dir() or paths[0].endswith(".ckpt")):
        from nlgmoe.checkpoint.newest import find_checkpoint  # imports Lightning, which takes seconds

        return GPTConfig.from_dict(read_document(find_checkpoint(paths[0]))["model_config"]), {}
    # train.py's parser, for the same defaults and errors; its imports take seconds.
    from nlgmoe.experiment import parse_config

    settings = parse_config(paths)
    return GPTConfig.from_dict(settings["model"]["config"]), settings


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
    config: GPTConfig, topology: Topology, gpu: Hardware, cost: Cost, options: Options, inputs: dict[str, Any]
) -> dict[str, Any]:
    """Return all results, in bytes, seconds, FLOPs and counts."""
    count, memory, communication = count_parameters(config), cost.memory, cost.communication
    return {
        "inputs": inputs | {"model": config.to_dict(), "topology": asdict(topology)},
        "params_total": count.total,
        "params_active": count.active,
        "params": asdict(count),
        "flops_per_token": flops_per_token(config, topology.length(config)),
        "experts_per_layer": experts_per_layer(config),
        "expert_parallel_degrees": topology.degrees(config),
        "memory": asdict(memory) | {"total": memory.total, "available": int(gpu.memory - RESERVED)},
        "communication": asdict(communication) | {"total": communication.total},
        "step_seconds": cost.time.total,
        "step_seconds_by_part": asdict(cost.time),
        "samples_per_second": cost.samples_per_second,
        "tokens_per_second": cost.tokens_per_second,
        "fits": cost.fits,
        "options": [
            {
                "changes": change,
                "memory_total": changed.memory.total,
                "tokens_per_second": changed.tokens_per_second,
                "fits_on": _fitting(changed),
            }
            for change, changed in options
        ],
    }


def as_text(
    config: GPTConfig, topology: Topology, gpu: Hardware, cost: Cost, options: Options, inputs: dict[str, Any]
) -> str:
    """Format the results as a table."""
    memory, sent, time, count = cost.memory, cost.communication, cost.time, count_parameters(config)
    hardware = str(inputs["hardware"])
    parts = {"embedding": count.embedding, "attention": count.attention, "norms": count.norms}
    parts |= {"dense FFN": count.dense_ffn, "router": count.router, "experts": count.experts}
    memory_parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    if memory.step > memory.activations + memory.buckets:  # the peak is in the optimizer's step
        memory_parts |= {"fp32 gradients in the step": memory.step}
    else:
        memory_parts |= {"activations": memory.activations, "ZeRO buckets": memory.buckets}
    available = gpu.memory - RESERVED
    verdict = (
        f"fits: uses {memory.total / available:.0%}" if cost.fits else f"does not fit: needs {_bytes(memory.total)}"
    )
    lines = [
        ("model", _model(config, topology.length(config))),
        ("run", _run(topology, hardware)),
        *_table("parameters", count.total, parts, _count, f"{_count(count.active)} active"),
        ("FLOPs per token", f"{_si(flops_per_token(config, topology.length(config)))}FLOP, forward and backward"),
        *_table("memory per rank", memory.total, memory_parts, _bytes),
        *([("", f"and {_bytes(memory.host)} of optimizer in the host's memory")] if memory.host else []),
        *_table("sent per rank and step", sent.total, _named(sent), _bytes),
        *_table("step time", time.total, _named(time), _seconds, f"at {inputs['utilisation']:.0%} of peak"),
        ("speed", f"{_si(cost.tokens_per_second)}tokens/s, {cost.samples_per_second:,.1f} samples/s on all GPUs"),
        ("result", f"{verdict} of the {_bytes(available)} available on {hardware}"),
        *(_option_rows(cost, options) if options else []),
    ]
    return "\n".join(f"{title:<23}{text}" for title, text in lines)


def _fitting(cost: Cost) -> list[str]:
    """Return the GPUs that a run fits, by their memory."""
    return [name for name, gpu in HARDWARE.items() if fits_on(cost.memory, gpu)]


def _spelled(change: dict[str, Any]) -> str:
    return " ".join(OPTIONS[name] if value is True else f"{OPTIONS[name]} {value}" for name, value in change.items())


def _option_rows(cost: Cost, options: Options) -> list[tuple[str, str]]:
    """Return a row for the run as given and one for each option: memory, speed, GPU with the least memory that it fits."""
    rows = [("as given", cost), *((_spelled(change), changed) for change, changed in options)]
    texts = [
        f"{_bytes(row.memory.total):>10}  {_si(row.tokens_per_second):>6}tokens/s  "
        f"{next(iter(_fitting(row)), 'fits none'):<9}  {name}"
        for name, row in rows
    ]
    return [("" if index else "options", text) for index, text in enumerate(texts)]


def _named(parts: Parts) -> dict[str, float]:
    names = {"all_to_all": "all-to-all"}
    return {names.get(name, name.replace("_", " ")): value for name, value in asdict(parts).items()}


def _model(config: GPTConfig, seq_len: int) -> str:
    shape = f"{config.num_layers} layers, hidden {config.hidden_size}, sequences of {seq_len}"
    moe, counts = config.moe, list(moe_blocks(config).values())
    if moe is None:
        return f"dense, {shape}"
    pyramid = ", ".join(f"{counts.count(experts)} layers of {experts}" for experts in dict.fromkeys(counts))
    return f"{'residual ' if moe.mlp_type == 'residual' else ''}MoE, {shape}; experts: {pyramid}, top-{moe.top_k}"


def _run(topology: Topology, hardware: str) -> str:
    batch = (
        f"batch {topology.global_batch_size} = {topology.gpus} x {topology.micro_batch_size} x {topology.accumulation}"
    )
    flags = ", activation checkpointing" if topology.activation_checkpointing else ""
    parallel = f"expert parallel up to {topology.expert_parallel_size}, ZeRO {topology.zero_stage}, "
    parallel = parallel if topology.deepspeed else ""
    return f"{topology.gpus} x {hardware}, {parallel}{topology.precision}, {batch} (GPUs x micro-batch x accumulation){flags}"


def _table(title: str, total: float, parts: dict[str, Any], form: Any, note: str = "") -> list[tuple[str, str]]:
    """Return a row `title  total  note` and a row for each part that is not 0."""
    rows = [(title, f"{form(total):>10}  {note}".rstrip())]
    return rows + [("", f"{form(value):>10}  {value / total:>4.0%}  {name}") for name, value in parts.items() if value]


def _si(value: float) -> str:
    """Format three digits and a decimal prefix, such as `12.3 G`, to be followed by a unit."""
    power = next((power for power in range(4) if abs(value) < 999.5 * 1000**power), 4)
    return f"{value / 1000**power:.3g} {' kMGT'[power].strip()}"


def _count(value: float) -> str:
    return f"{value / 1e9:.3f} B" if value >= 1e9 else f"{value / 1e6:.3f} M"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 / 10 else f"{value / 2**20:.2f} MiB"


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.3f} ms"
