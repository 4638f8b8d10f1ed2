"""Output of `nlgmoe inspect`: a table, or one JSON object."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.model.counting import count_parameters, flops_per_token
from nlgmoe.monitoring.hardware import RESERVED, Hardware
from nlgmoe.pyramid import experts_per_layer, moe_blocks
from nlgmoe.tools.planner.cost import Cost
from nlgmoe.tools.planner.fitting import Suggestion
from nlgmoe.tools.planner.roofline import Parts
from nlgmoe.tools.planner.topology import Topology

OPTIONS = {
    "zero_stage": "--zero",
    "expert_parallel_size": "--expert-parallel",
    "micro_batch_size": "--micro-batch",
    "global_batch_size": "--global-batch",
    "gpus": "--gpus",
    "hardware": "--hardware",
    "activation_checkpointing": "--activation-checkpointing",
}
"""The option for each change that `fitting.py` suggests; `deepspeed` follows from the others."""


def as_json(
    config: GPTConfig, topology: Topology, gpu: Hardware, cost: Cost, changes: list[Suggestion], inputs: dict[str, Any]
) -> dict[str, Any]:
    """Return all results, in bytes, seconds, FLOPs and counts."""
    count, memory, communication = count_parameters(config), cost.memory, cost.communication
    return {
        "inputs": inputs | {"model": config.to_dict(), "topology": asdict(topology)},
        "params_total": count.total,
        "params_active": count.active,
        "params": asdict(count),
        "flops_per_token": flops_per_token(config),
        "experts_per_layer": experts_per_layer(config),
        "expert_parallel_degrees": topology.degrees(config),
        "memory": asdict(memory) | {"total": memory.total, "available": int(gpu.memory - RESERVED)},
        "communication": asdict(communication) | {"total": communication.total},
        "step_seconds": cost.time.total,
        "step_seconds_by_part": asdict(cost.time),
        "roofline_seconds": cost.roofline.total,
        "roofline_seconds_by_part": asdict(cost.roofline),
        "roofline_mfu": cost.roofline.utilisation(config, topology, gpu),
        "samples_per_second": cost.samples_per_second,
        "tokens_per_second": cost.tokens_per_second,
        "fits": cost.fits,
        "suggestions": [
            {
                "changes": suggestion.changes,
                "memory_total": suggestion.cost.memory.total,
                "tokens_per_second": suggestion.cost.tokens_per_second,
            }
            for suggestion in changes
        ],
    }


def as_text(
    config: GPTConfig, topology: Topology, gpu: Hardware, cost: Cost, changes: list[Suggestion], inputs: dict[str, Any]
) -> str:
    """Format the results as a table."""
    memory, sent, time, count = cost.memory, cost.communication, cost.time, count_parameters(config)
    parts = {"embedding": count.embedding, "attention": count.attention, "norms": count.norms}
    parts |= {"dense FFN": count.dense_ffn, "router": count.router, "experts": count.experts}
    memory_parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    if memory.step > memory.activations + memory.buckets:  # the peak is in the optimizer's step
        memory_parts |= {"fp32 gradients in the step": memory.step}
    else:
        memory_parts |= {"activations": memory.activations, "ZeRO buckets": memory.buckets}
    mfu = cost.roofline.utilisation(config, topology, gpu)
    lines = [
        ("model", describe_model(config)),
        ("run", describe_run(topology, str(inputs["hardware"]))),
        *_table("parameters", count.total, parts, _count, f"{_count(count.active)} active"),
        ("FLOPs per token", f"{_si(flops_per_token(config))}FLOP, forward and backward"),
        *_table("memory per rank", memory.total, memory_parts, _bytes),
        *([("", f"and {_bytes(memory.host)} of optimizer in the host's memory")] if memory.host else []),
        *_table("sent per rank and step", sent.total, _named(sent), _bytes),
        *_table("step time", time.total, _named(time), _seconds, f"at {inputs['utilisation']:.0%} of peak"),
        *_table(
            "roofline",
            cost.roofline.total,
            _named(cost.roofline),
            _seconds,
            f"a micro-batch, forward and backward; MFU {mfu:.2f}",
        ),
        ("speed", f"{_si(cost.tokens_per_second)}tokens/s, {cost.samples_per_second:,.1f} samples/s on all GPUs"),
        ("result", describe_fit(cost, gpu, str(inputs["hardware"]))),
        *(("" if index else "to make it fit", describe_change(change)) for index, change in enumerate(changes)),
    ]
    return "\n".join(f"{title:<23}{text}" for title, text in lines)


def _named(parts: Parts) -> dict[str, float]:
    names = {"all_to_all": "all-to-all"}
    return {names.get(name, name.replace("_", " ")): value for name, value in asdict(parts).items()}


def describe_model(config: GPTConfig) -> str:
    """Describe the model in one line: shape and experts."""
    shape = f"{config.num_layers} layers, hidden {config.hidden_size}, sequences of {config.seq_len}"
    moe, counts = config.moe, list(moe_blocks(config).values())
    if moe is None:
        return f"dense, {shape}"
    pyramid = ", ".join(f"{counts.count(experts)} layers of {experts}" for experts in dict.fromkeys(counts))
    return f"{'residual ' if moe.mlp_type == 'residual' else ''}MoE, {shape}; experts: {pyramid}, top-{moe.top_k}"


def describe_run(topology: Topology, hardware: str) -> str:
    """Describe the layout in one line."""
    batch = (
        f"batch {topology.global_batch_size} = {topology.gpus} x {topology.micro_batch_size} x {topology.accumulation}"
    )
    flags = ", activation checkpointing" if topology.activation_checkpointing else ""
    parallel = f"expert parallel up to {topology.expert_parallel_size}, ZeRO {topology.zero_stage}, "
    parallel = parallel if topology.deepspeed else ""
    return f"{topology.gpus} x {hardware}, {parallel}{topology.precision}, {batch} (GPUs x micro-batch x accumulation){flags}"


def describe_fit(cost: Cost, gpu: Hardware, hardware: str) -> str:
    """Compare the predicted with the available memory."""
    available = gpu.memory - RESERVED
    if cost.fits:
        return f"fits: uses {cost.memory.total / available:.0%} of the {_bytes(available)} available on {hardware}"
    return f"does not fit: needs {_bytes(cost.memory.total)} of the {_bytes(available)} available on {hardware}"


def describe_change(change: Suggestion) -> str:
    """Format the options to set, with the memory and speed that result."""
    named = {OPTIONS[name]: value for name, value in change.changes.items() if name in OPTIONS}
    options = " ".join(option if value is True else f"{option} {value}" for option, value in named.items())
    return f"{options}  ({_bytes(change.cost.memory.total)}, {_si(change.cost.tokens_per_second)}tokens/s)"


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
