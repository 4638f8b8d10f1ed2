"""`nlgmoe inspect`: the cost of a configuration, predicted without running it, as a table or JSON."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nlgmoe.config import GPTConfig
from nlgmoe.hardware import HARDWARE, RESERVED, hardware_named
from nlgmoe.model.counting import count_parameters, flops_per_token
from nlgmoe.pyramid import experts_per_layer, moe_blocks
from nlgmoe.tools.planner.cost import Communication, Cost, estimate
from nlgmoe.tools.planner.memory import Memory, parameter_groups
from nlgmoe.tools.planner.muon import muon_step
from nlgmoe.tools.planner.topology import Topology, layout, read_settings
from nlgmoe.without_effect import without_effect

if TYPE_CHECKING:
    from nlgmoe.tools.planner.simulate import Simulated

NOT_SHOWN = "not simulated: speed of kernels, stragglers, NCCL's own memory, bandwidth, a teacher, text, callbacks"


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
    simulate: bool = False,
    rank: int = 0,
    json: bool = False,
) -> None:
    """Predict a run's parameters, memory and communication, and whether it fits, without running it.

    Args:
        files: YAML files of train.py, later ones override earlier ones; or one folder of a checkpoint or run, of which
            the model alone is read (a run's settings are in RUN/config.yaml).
        gpus: ranks; default: the files' setting, and 1 if they leave it to the machine.
        expert_parallel: upper bound of the expert-parallel degree; default: the files' strategy.
        zero: ZeRO stage, 1 or 2; default: the files' strategy.
        micro_batch: sequences per rank and forward pass; default: data.micro_batch_size.
        global_batch: sequences per optimizer step; default: the files' setting.
        precision: Lightning's name, such as bf16-mixed; default: the files' setting, and bf16-mixed if they set neither
            trainer.precision nor trainer.accelerator.
        activation_checkpointing: recompute blocks in the backward pass, even if the files do not set it.
        hardware: GPU of each rank, v100-32, a100-40, a100-80, h100 or h200; default: names those that have the memory.
        simulate: also run one rank's optimizer step without values, and compare.
        rank: of --simulate: number of the rank.
        json: print one JSON object instead of a table.
    """
    model, settings = read_settings(files)
    given = {
        "gpus": gpus,
        "expert_parallel_size": expert_parallel,
        "zero_stage": zero,
        "micro_batch_size": micro_batch,
        "global_batch_size": global_batch,
        "activation_checkpointing": activation_checkpointing or None,
        "precision": precision,
    }
    topology = layout(settings, {name: value for name, value in given.items() if value is not None})
    available = None if hardware is None else int(hardware_named(hardware).memory - RESERVED)
    cost = estimate(model, topology)
    simulation = {}
    if simulate:
        from nlgmoe.tools.planner.simulate import simulate as simulate_rank  # imports DeepSpeed, which takes seconds

        simulation = simulation_as_json(model, topology, cost, simulate_rank(files, settings, topology, rank))
    if json:
        inputs = {"files": files, "hardware": hardware}
        print(json_format.dumps(as_json(model, topology, available, cost, inputs) | simulation, indent=2))
        return
    print(as_text(model, topology, hardware, available, cost))
    if simulate:
        print(simulation_as_text(simulation))


def as_json(
    config: GPTConfig, topology: Topology, available: int | None, cost: Cost, inputs: dict[str, Any]
) -> dict[str, Any]:
    """Return all results, in bytes, FLOPs and counts; null where the machine's memory is unknown."""
    count, memory, sent = count_parameters(config), cost.memory, cost.communication
    return {
        "inputs": inputs | {"model": config.to_dict(), "topology": asdict(topology)},
        "params_total": count.total,
        "params_active": count.active,
        "params": asdict(count),
        "flops_per_token": flops_per_token(config, topology.length(config)),
        "muon": asdict(muon_step(config, topology)),
        "experts_per_layer": experts_per_layer(config),
        "expert_parallel_degrees": topology.degrees(config),
        "memory": asdict(memory) | {"activations": memory.activations, "total": memory.total, "available": available},
        "communication": asdict(sent) | {"total": sent.total},
        "fits": None if available is None else memory.total <= available,
        "fits_on": gpus_that_fit(cost.memory),
    }


def simulation_as_json(config: GPTConfig, topology: Topology, cost: Cost, simulated: Simulated) -> dict[str, Any]:
    """Return prediction and simulation under the same keys; bytes and counts."""
    sent = asdict(cost.communication) | {"muon_matrices": muon_step(config, topology, simulated.rank).sent}
    predicted: dict[str, Any] = {"peak_bytes": cost.memory.total, "bytes": sent}
    measured = asdict(simulated) | {"bytes": dict.fromkeys(predicted["bytes"], 0) | simulated.bytes}
    return {"predicted": predicted, "simulated": measured}


# ---- tables


def as_text(config: GPTConfig, topology: Topology, hardware: str | None, available: int | None, cost: Cost) -> str:
    """Format the results as a table."""
    memory, sent, count = cost.memory, cost.communication, count_parameters(config)
    parts = {"embedding": count.embedding, "attention": count.attention, "norms": count.norms}
    parts |= {"dense FFN": count.dense_ffn, "router": count.router, "experts": count.experts}
    memory_parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    if memory.step > memory.activations + memory.buckets_at_peak:  # the peak is in the optimizer's step
        memory_parts |= {"fp32 gradients in the step": memory.step}
    else:
        memory_parts |= {"activations": memory.activations, "ZeRO buckets": memory.buckets_at_peak}
    lines = [
        ("model", _model(config, topology.length(config))),
        *([("", line)] if (line := without_effect(config)) else []),
        ("run", _run(topology, hardware)),
        *_table("parameters", count.total, parts, _count, f"{_count(count.active)} active"),
        ("FLOPs per token", f"{_si(flops_per_token(config, topology.length(config)))}FLOP, forward and backward"),
        *_muon(config, topology),
        *_table("memory per rank", memory.total, memory_parts, _bytes),
        *([("", f"and {_bytes(memory.host)} of optimizer in the host's memory")] if memory.host else []),
        *_table("sent per rank and step", sent.total, _named(sent), _bytes),
        ("result", _verdict(memory, available)),
    ]
    return "\n".join(f"{title:<23}{text}" for title, text in lines)


def simulation_as_text(report: dict[str, Any]) -> str:
    """Format the result of `simulation_as_json`."""
    predicted, simulated = report["predicted"], report["simulated"]
    lines = [("", f"{'predicted':>14}{'simulated':>14}")]
    for index, (kind, sent) in enumerate(simulated["bytes"].items()):
        title = f"sent by rank {simulated['rank']}, MB" if index == 0 else ""
        expected = f"{predicted['bytes'][kind] / 1e6:,.3f}" if kind in predicted["bytes"] else ""
        calls = f"{simulated['calls'].get(kind, 0):>6} calls  {kind.replace('_', ' ')}"
        lines.append((title, f"{expected:>14}{sent / 1e6:>14,.3f}{calls}"))
    peaks = [values["peak_bytes"] for values in (predicted, simulated)]
    texts = [*(f"{peak / 2**30:>14.2f}" for peak in peaks), f"  {peaks[0] / peaks[1] - 1:+.1%}"]
    lines.append(("peak memory, GiB", "".join(texts)))
    return "\n".join(f"{title:<23}{text}" for title, text in lines) + f"\n{NOT_SHOWN}"


def _muon(config: GPTConfig, topology: Topology) -> list[tuple[str, str]]:
    if topology.muon is None:
        return []
    muon, held = muon_step(config, topology), sum(group.parameters for group in parameter_groups(config, topology))
    tokens = topology.micro_batch_size * topology.length(config) * topology.accumulation  # of a rank
    share = muon.flops / (tokens * flops_per_token(config, topology.length(config)))
    return [
        ("optimizers", f"Muon {_count(muon.parameters)} parameters of a rank, AdamW {_count(held - muon.parameters)}"),
        ("", f"Newton-Schulz: {_si(muon.flops)}FLOP a step of a rank, {share:.0%} of the model's"),
    ]


def _verdict(memory: Memory, available: int | None) -> str:
    fitting = f"fits {', '.join(gpus_that_fit(memory)) or 'no GPU that is known'}"
    if available is None:
        return fitting
    share = f"{_bytes(memory.total)} of {_bytes(available)}, {memory.total / available:.0%}"
    return f"uses {share}" if memory.total <= available else f"does not fit: needs {share}; {fitting}"


def gpus_that_fit(memory: Memory) -> list[str]:
    """Return the GPUs of `HARDWARE` that have this memory."""
    return [name for name, gpu in HARDWARE.items() if memory.total <= gpu.memory - RESERVED]


def _named(parts: Communication) -> dict[str, int]:
    return {name.replace("all_to_all", "all-to-all").replace("_", " "): size for name, size in asdict(parts).items()}


def _model(config: GPTConfig, seq_len: int) -> str:
    shape = f"{config.num_layers} layers, hidden {config.hidden_size}, sequences of {seq_len}"
    moe, counts = config.moe, list(moe_blocks(config).values())
    if moe is None:
        return f"dense, {shape}"
    pyramid = ", ".join(f"{counts.count(experts)} layers of {experts}" for experts in dict.fromkeys(counts))
    return f"{'residual ' if moe.mlp_type == 'residual' else ''}MoE, {shape}; experts: {pyramid}, top-{moe.top_k}"


def _run(topology: Topology, hardware: str | None) -> str:
    factors = f"{topology.gpus} x {topology.micro_batch_size} x {topology.accumulation}"
    batch = f"batch {topology.global_batch_size} = {factors} (GPUs x micro-batch x accumulation)"
    flags = ", activation checkpointing" if topology.activation_checkpointing else ""
    parallel = f"expert parallel up to {topology.expert_parallel_size}, ZeRO {topology.zero_stage}, "
    parallel = parallel if topology.deepspeed else ""
    return f"{topology.gpus} x {hardware or 'rank'}, {parallel}{topology.precision}, {batch}{flags}"


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
