"""`nlgmoe inspect`: the cost of a configuration, predicted without building the model."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from nlgmoe.config import GPTConfig
from nlgmoe.model.counting import count_parameters, flops_per_token
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.planner.cost import UTILISATION, Cost, estimate
from nlgmoe.tools.planner.memory import memory_options
from nlgmoe.tools.planner.table import Options, as_text, gpus_that_fit, simulation_as_text
from nlgmoe.tools.planner.topology import Machine, Topology, layout, machine_of, read_settings
from nlgmoe.validation import require

if TYPE_CHECKING:
    from nlgmoe.tools.planner.simulate import Simulated

COMMUNICATOR = 688e6
"""Bytes of a NCCL communicator, on A100s (github.com/NVIDIA/nccl/issues/964); an estimate, as `hardware.RESERVED` is."""


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
    machine = machine_of(settings, topology, hardware)
    cost = estimate(model, topology, machine, utilisation)
    changes = memory_options(model, topology) if cost.fits is False else []
    options = [(change, estimate(model, replace(topology, **change), machine, utilisation)) for change in changes]
    simulation = {}
    if simulate:
        from nlgmoe.tools.planner.simulate import simulate as simulate_rank  # imports DeepSpeed, which takes seconds

        require(disk > 0, f"--disk={disk} must be above 0 GB/s")
        simulation = simulation_as_json(model, topology, cost, simulate_rank(files, settings, topology, rank), disk)
    if json:
        inputs = {"files": files, "hardware": machine.name, "utilisation": utilisation}
        print(json_format.dumps(as_json(model, topology, machine, cost, options, inputs) | simulation, indent=2))
        return
    if hardware is not None and settings.get("trainer", {}).get("accelerator") == "cpu":
        print(f"note                   the files set a CPU; speed and memory below are those of {hardware}")
    print(as_text(model, topology, machine, cost, options, utilisation))
    if simulate:
        print(simulation_as_text(simulation, topology))


def as_json(
    config: GPTConfig, topology: Topology, machine: Machine, cost: Cost, options: Options, inputs: dict[str, Any]
) -> dict[str, Any]:
    """Return all results, in bytes, seconds, FLOPs and counts; null where the machine's memory or rates are unknown."""
    count, memory, sent, time = count_parameters(config), cost.memory, cost.communication, cost.time
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
        "communication": asdict(sent) | {"total": sent.total},
        "step_seconds": time and time.total,
        "step_seconds_by_part": time and asdict(time),
        "samples_per_second": cost.samples_per_second,
        "tokens_per_second": cost.tokens_per_second,
        "fits": cost.fits,
        "options": [
            {
                "changes": change,
                "memory_total": changed.memory.total,
                "tokens_per_second": changed.tokens_per_second,
                "fits_on": gpus_that_fit(changed.memory),
            }
            for change, changed in options
        ],
    }


def simulation_as_json(
    config: GPTConfig, topology: Topology, cost: Cost, simulated: Simulated, disk: float
) -> dict[str, Any]:
    """Return prediction and simulation under the same keys; bytes, seconds and counts."""
    groups = topology.communicators(config)
    predicted: dict[str, Any] = {
        "peak_bytes": cost.memory.total,
        "bytes": asdict(cost.communication),
        "communicators": groups,
        "communicator_bytes": int(COMMUNICATOR * len(groups)),
    }
    measured = asdict(simulated) | {
        "bytes": dict.fromkeys(predicted["bytes"], 0) | simulated.bytes,
        "save_seconds": simulated.checkpoint_bytes / (disk * 1e9),
        "resume_seconds": simulated.resume_bytes * topology.gpus / (disk * 1e9),
    }
    return {"predicted": predicted, "simulated": measured}
