"""The cost model: memory and communication of a training step, by arithmetic.

    memory         weights + gradients + optimizer + activations + ZeRO's buckets, on one rank
    communication  bytes that one rank sends in one optimizer step

docs/results/scaling.md documents the formulas, sources, assumptions and checks.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from nlgmoe.config import GPTConfig
from nlgmoe.tools.planner.memory import Memory, ParameterGroup, memory_of, parameter_groups
from nlgmoe.tools.planner.muon import muon_step
from nlgmoe.tools.planner.topology import Topology


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in one optimizer step."""

    all_to_all: int  # tokens to their experts and back, forward and backward
    dense_gradients: int  # all-reduce over all ranks
    expert_gradients: int  # all-reduce over the ranks that hold the same experts
    gathered_weights: int  # ZeRO's all-gather of updated weights
    muon_matrices: int  # pieces of matrices that ZeRO has cut, of the rank that sends most

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(astuple(self))


@dataclass(frozen=True)
class Cost:
    """Cost of an optimizer step."""

    memory: Memory  # of a rank
    communication: Communication  # of a rank


def estimate(config: GPTConfig, topology: Topology) -> Cost:
    """Estimate the cost of one optimizer step."""
    memory, groups = memory_of(config, topology), parameter_groups(config, topology)
    dense, *experts = [_all_reduce_bytes(group, topology) for group in groups]
    communication = Communication(
        all_to_all=sum(_all_to_all_bytes(config, topology, degree) for degree in topology.degrees(config)),
        dense_gradients=dense,
        expert_gradients=sum(experts),
        gathered_weights=sum(_all_gather_bytes(group, topology) for group in groups),
        muon_matrices=muon_step(config, topology).sent,
    )
    return Cost(memory, communication)


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
