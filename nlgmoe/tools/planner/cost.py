"""The cost model: memory, communication and time of a training step, by arithmetic.

    memory         weights + gradients + optimizer + activations + ZeRO's buckets, on one rank
    communication  bytes that one rank sends in one optimizer step
    step time      compute + all-to-all + gradient reduction beyond the last backward pass + weight gathering + optimizer

docs/results/scaling.md documents the formulas, sources, assumptions and checks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nlgmoe.config import GPTConfig
from nlgmoe.hardware import Hardware
from nlgmoe.model.counting import flops_per_token
from nlgmoe.tools.planner.memory import Memory, ParameterGroup, memory_of, parameter_groups
from nlgmoe.tools.planner.muon import muon_step
from nlgmoe.tools.planner.topology import Machine, Topology
from nlgmoe.validation import require

UTILISATION = 0.44
"""Achieved fraction of peak FLOP/s: Megatron-LM's 1.7B model on 32 A100s, 137 TFLOP/s (arXiv 2104.04473, table 1)."""


@dataclass(frozen=True)
class Parts:
    """Parts, as fields, and their sum."""

    @property
    def total(self) -> float:
        """Sum of all fields."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Communication(Parts):
    """Bytes that one rank sends in one optimizer step."""

    all_to_all: int  # tokens to their experts and back, forward and backward
    dense_gradients: int  # all-reduce over all ranks
    expert_gradients: int  # all-reduce over the ranks that hold the same experts
    gathered_weights: int  # ZeRO's all-gather of updated weights
    muon_matrices: int  # pieces of matrices that ZeRO has cut, of the rank that sends most


@dataclass(frozen=True)
class StepTime(Parts):
    """Seconds of one optimizer step by part; parts do not overlap."""

    compute: float  # forward and backward passes of all micro-batches, and recomputation
    all_to_all: float  # exchange of tokens
    gradients: float  # reduction of gradients beyond the backward pass that hides it
    gathered_weights: float  # ZeRO's all-gather of updated weights, and the exchange of matrices that it has cut
    optimizer: float  # the optimizer's reads and writes
    newton_schulz: float  # Muon's products


@dataclass(frozen=True)
class Cost:
    """Cost of an optimizer step on a machine."""

    memory: Memory  # of a rank
    communication: Communication  # of a rank
    time: StepTime | None  # None, and the rates too: the machine's are unknown
    samples_per_second: float | None  # of all ranks
    tokens_per_second: float | None  # of all ranks
    fits: bool | None  # the machine has the memory; None: unknown


def estimate(config: GPTConfig, topology: Topology, machine: Machine, utilisation: float = UTILISATION) -> Cost:
    """Estimate the cost of one optimizer step, as far as a rank's machine is known; `utilisation` is in (0, 1]."""
    require(0 < utilisation <= 1, f"utilisation={utilisation} must be above 0 and at most 1")
    memory, groups = memory_of(config, topology), parameter_groups(config, topology)
    dense, *experts = [_all_reduce_bytes(group, topology) for group in groups]
    communication = Communication(
        all_to_all=sum(_all_to_all_bytes(config, topology, degree) for degree in topology.degrees(config)),
        dense_gradients=dense,
        expert_gradients=sum(experts),
        gathered_weights=sum(_all_gather_bytes(group, topology) for group in groups),
        muon_matrices=muon_step(config, topology).sent,
    )
    fits = None if machine.memory is None else memory.total <= machine.memory
    if machine.rates is None:
        return Cost(memory, communication, None, None, None, fits)
    time = _time(config, topology, groups, machine.rates, utilisation)
    samples = topology.global_batch_size / time.total
    return Cost(memory, communication, time, samples, samples * topology.length(config), fits)


def _all_to_all_bytes(config: GPTConfig, topology: Topology, degree: int) -> int:
    """Return the bytes of one MoE layer's all-to-alls.

    The row of every assignment is sent and returned, forward and backward, and again if the block is recomputed. `1 / degree`
    of the rows remain on the rank.
    """
    if degree < 2:
        return 0
    assert config.moe is not None
    passes = 6 if topology.activation_checkpointing else 4
    rows = topology.micro_batch_size * topology.length(config) * config.moe.top_k * topology.accumulation
    return passes * rows * config.hidden_size * topology.bytes_per.compute * (degree - 1) // degree


def _all_reduce_bytes(group: ParameterGroup, topology: Topology) -> int:
    """Return the bytes of gradients that a rank sends.

    A ring all-reduce sends `2 (n - 1) / n` of the bytes. ZeRO 2 reduces after every micro-batch; DeepSpeed all-reduces its
    buckets under ZeRO too (`use_multi_rank_bucket_allreduce`, on by default).
    """
    times = topology.accumulation if topology.zero_stage == 2 else 1
    return 2 * group.parameters * topology.bytes_per.gradient * (group.copies - 1) // group.copies * times


def _all_gather_bytes(group: ParameterGroup, topology: Topology) -> int:
    if not topology.zero_stage:
        return 0
    return group.parameters * topology.bytes_per.weight * (group.copies - 1) // group.copies


def _time(
    config: GPTConfig, topology: Topology, groups: list[ParameterGroup], gpu: Hardware, utilisation: float
) -> StepTime:
    size = topology.bytes_per
    tokens = topology.micro_batch_size * topology.length(config) * topology.accumulation  # of one rank
    peak = (gpu.fp32_flops if size.compute == 4 else gpu.half_flops) * utilisation
    forward = flops_per_token(config, topology.length(config)) / 3
    recomputed = forward - 2 * config.hidden_size * config.vocab_size if topology.activation_checkpointing else 0.0
    compute = tokens * (3 * forward + recomputed) / peak

    all_to_all = 0.0
    for degree in topology.degrees(config):
        sent = _all_to_all_bytes(config, topology, degree)
        remote = max(0, degree - gpu.gpus_per_node) / max(1, degree - 1)  # fraction that leaves the node
        all_to_all += max(sent * (1 - remote) / gpu.nvlink, sent * remote / gpu.network)

    reduction = sum(_all_reduce_bytes(group, topology) / _bandwidth(group, topology, gpu) for group in groups)
    # The reduction overlaps with the backward pass: of every micro-batch under ZeRO 2, else of the last.
    backward = compute * (2 * forward + recomputed) / (3 * forward + recomputed)
    overlapped = backward if topology.zero_stage == 2 else backward / topology.accumulation
    gathering = sum(_all_gather_bytes(group, topology) / _bandwidth(group, topology, gpu) for group in groups)

    updated = sum(group.parameters / (group.copies if topology.zero_stage else 1) for group in groups)
    # Read and write the state; read the gradient, write the working weight.
    muon = muon_step(config, topology)
    is_half = topology.muon is None or topology.muon.ns_precision == "bf16"
    newton_schulz = muon.flops / ((gpu.half_flops if is_half else gpu.fp32_flops) * utilisation)
    gathering += muon.sent / (gpu.nvlink if topology.gpus <= gpu.gpus_per_node else gpu.network)
    moved = 2 * (size.moments + (size.master or size.weight)) + size.gradient + (size.weight if size.master else 0)
    optimizer = (updated * moved - 2 * muon.state * size.moments // 2) / gpu.memory_bandwidth
    return StepTime(compute, all_to_all, max(0.0, reduction - overlapped), gathering, optimizer, newton_schulz)


def _bandwidth(group: ParameterGroup, topology: Topology, gpu: Hardware) -> float:
    """Return bytes/s of a ring over a group's copies, which uses the network card of every copy on a node.

    As in DeepSpeed, an expert-parallel group is `degree` consecutive ranks, and copies of an expert are `degree` ranks apart.
    """
    degree = topology.gpus // group.copies
    per_node = min(group.copies, max(1, gpu.gpus_per_node // degree))
    return gpu.nvlink if per_node == group.copies else min(gpu.nvlink, per_node * gpu.network)
