"""The cost model: memory, communication and time of a training step, by arithmetic; no model is built.

    memory         weights + gradients + optimizer + activations + ZeRO's buckets, on one rank
    communication  bytes that one rank sends in one optimizer step
    step time      compute + all-to-all + gradient reduction beyond the last backward pass + weight gathering + optimizer

docs/planning.md documents the formulas, sources, assumptions and checks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.hardware import RESERVED, Hardware
from nlgmoe.model.counting import count_parameters, expert_parameters, flops_per_token
from nlgmoe.parts import require_paper_parts
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.planner.activation_memory import activations_by_pass
from nlgmoe.tools.planner.topology import Topology
from nlgmoe.validation import SettingError

UTILISATION = 0.44
"""Achieved fraction of peak FLOP/s: Megatron-LM's 1.7B model on 32 A100s, 137 TFLOP/s (arXiv 2104.04473, table 1)."""

BUCKET = 200_000_000
"""Elements of a ZeRO reduction bucket: Lightning's default. Several GPUs have two: one is reduced while the other is filled."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Gradients and activations are added, although their peaks are at different times.

    Attributes:
        weights: weights used in computation, and autocast's copies.
        gradients: gradients of the weights that are there in every micro-batch: ZeRO 1 keeps, without accumulation, its shard.
        optimizer: Adam's moments and fp32 master weights.
        forward: activations in the forward pass, see `activation_memory.py`.
        backward: activations while there are buckets: in the backward pass; with accumulation also in the next forward pass.
        buckets: ZeRO's reduction buffers.
        step: flat copies of gradients in ZeRO's optimizer step, after activations and buckets are freed.
        host: offloaded optimizer state in host memory; not part of `total`.
    """

    weights: int
    gradients: int
    optimizer: int
    forward: int
    backward: int
    buckets: int
    step: int
    host: int

    @property
    def total(self) -> int:
        """Bytes of GPU memory."""
        return self.weights + self.gradients + self.optimizer + max(self.activations + self.buckets_at_peak, self.step)

    @property
    def activations(self) -> int:
        """Bytes of activations at the peak."""
        return self.backward if self.buckets_at_peak else max(self.forward, self.backward)

    @property
    def buckets_at_peak(self) -> int:
        """Bytes of buckets at the peak, which is in a forward pass without them if the head needs more."""
        return self.buckets if self.backward + self.buckets > self.forward else 0


@dataclass(frozen=True)
class Parts:
    """Parts, as fields, and their sum."""

    @property
    def total(self) -> float:
        """Sum of all fields."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Communication(Parts):
    """Bytes that one rank sends in one optimizer step.

    Attributes:
        all_to_all: tokens to their experts and back, forward and backward.
        dense_gradients: all-reduce over all ranks.
        expert_gradients: all-reduce over the ranks that hold the same experts.
        gathered_weights: ZeRO's all-gather of updated weights.
    """

    all_to_all: int
    dense_gradients: int
    expert_gradients: int
    gathered_weights: int


@dataclass(frozen=True)
class StepTime(Parts):
    """Seconds of one optimizer step by part; parts do not overlap.

    Attributes:
        compute: forward and backward passes of all micro-batches, and recomputation.
        all_to_all: exchange of tokens.
        gradients: reduction of gradients beyond the backward pass that hides it.
        gathered_weights: ZeRO's all-gather of updated weights.
        optimizer: AdamW's update.
    """

    compute: float
    all_to_all: float
    gradients: float
    gathered_weights: float
    optimizer: float


@dataclass(frozen=True)
class Cost:
    """Cost of an optimizer step; rates are of all ranks."""

    memory: Memory
    communication: Communication
    time: StepTime
    samples_per_second: float
    tokens_per_second: float
    fits: bool


@dataclass(frozen=True)
class _ParameterGroup:
    """Parameters on one rank, replicated on `copies` ranks."""

    parameters: int
    copies: int


def estimate(config: GPTConfig, topology: Topology, gpu: Hardware, utilisation: float = UTILISATION) -> Cost:
    """Estimate the cost of one optimizer step.

    Args:
        config: the model.
        topology: layout over ranks.
        gpu: GPU of a rank.
        utilisation: achieved fraction of peak FLOP/s in matrix products, in (0, 1].
    """
    if not 0 < utilisation <= 1:
        raise SettingError(f"utilisation={utilisation} must be above 0 and at most 1")
    memory, communication = memory_of(config, topology), communication_of(config, topology)
    time = _time(config, topology, gpu, utilisation)
    samples = topology.global_batch_size / time.total
    return Cost(memory, communication, time, samples, samples * topology.length(config), fits_on(memory, gpu))


def fits_on(memory: Memory, gpu: Hardware) -> bool:
    """Compare the memory of a rank with what a GPU has for tensors."""
    return memory.total <= gpu.memory - RESERVED


def memory_options(config: GPTConfig, topology: Topology) -> list[dict[str, Any]]:
    """Return changes of `topology` that lower a rank's memory: every setting alone at its lowest memory, then all together."""
    changes: dict[str, Any] = {}
    if topology.deepspeed and topology.gpus > 1 and topology.zero_stage < 2 and topology.accumulation > 1:
        changes["zero_stage"] = 2
    widest = max(topology.expert_parallel_size, min(topology.gpus, max(experts_per_layer(config))))
    if topology.deepspeed and replace(topology, expert_parallel_size=widest).degrees(config) != topology.degrees(
        config
    ):
        changes["expert_parallel_size"] = widest
    if not topology.activation_checkpointing:
        changes["activation_checkpointing"] = True
    if topology.micro_batch_size > 1:
        changes["micro_batch_size"] = 1
    return [{name: value} for name, value in changes.items()] + ([changes] if len(changes) > 1 else [])


def _parameter_groups(config: GPTConfig, topology: Topology) -> list[_ParameterGroup]:
    """Return the dense parameters, then the experts of every MoE layer."""
    require_paper_parts(config, "the cost model supports", ["moe.expert"])
    count = count_parameters(config)
    groups = [_ParameterGroup(count.total - count.experts, topology.gpus)]
    for experts, degree in zip(experts_per_layer(config), topology.degrees(config), strict=True):
        if experts:
            groups.append(_ParameterGroup(experts // degree * expert_parameters(config), topology.gpus // degree))
    return groups


def memory_of(config: GPTConfig, topology: Topology) -> Memory:
    """Return the bytes on one rank.

    ZeRO 1 and 2 shard the optimizer state over the ranks that replicate its weights; ZeRO 2 the gradients too.
    """
    groups = _parameter_groups(config, topology)
    size = topology.bytes_per
    full = sum(group.parameters for group in groups)
    sharded = sum(-(-group.parameters // group.copies) for group in groups)  # rounded up: ZeRO pads
    count = count_parameters(config)
    positions = config.seq_len * config.hidden_size if config.rope_theta is None else 0
    uncast = count.norms + count.router + positions  # parameters that autocast leaves in fp32
    optimizer = (sharded if topology.zero_stage else full) * (size.master + size.moments)
    if topology.muon:  # biases are counted with the matrices
        optimizer -= (count.attention + count.dense_ffn + count.experts) * size.moments // 2
    in_fp32 = size.accumulated > size.gradient  # the step needs no copy
    copies = 4 + (size.gradient if size.gradient < 4 else 0)  # bytes of the flat gradient, in fp32 and before
    buckets = 2 if topology.gpus > 1 else 1
    forward, backward = activations_by_pass(config, topology)
    if topology.accumulation > 1:  # ZeRO keeps its buckets from the first micro-batch to the step
        backward = max(forward, backward)
    reduced_at_once = topology.zero_stage == 1 and topology.accumulation == 1
    return Memory(
        weights=full * size.weight + (full - uncast) * size.cast,
        gradients=(sharded if topology.zero_stage == 2 or reduced_at_once else full) * size.accumulated,
        optimizer=0 if topology.offload_optimizer else optimizer,
        forward=forward,
        backward=backward,
        buckets=buckets * BUCKET * size.gradient if topology.zero_stage else 0,
        step=copies * sharded if topology.zero_stage and not topology.offload_optimizer and not in_fp32 else 0,
        host=optimizer if topology.offload_optimizer else 0,
    )


def communication_of(config: GPTConfig, topology: Topology) -> Communication:
    """Return the bytes that one rank sends in one optimizer step."""
    groups = _parameter_groups(config, topology)
    dense, *experts = [_all_reduce_bytes(group, topology) for group in groups]
    return Communication(
        all_to_all=sum(_all_to_all_bytes(config, topology, degree) for degree in topology.degrees(config)),
        dense_gradients=dense,
        expert_gradients=sum(experts),
        gathered_weights=sum(_all_gather_bytes(group, topology) for group in groups),
    )


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


def _all_reduce_bytes(group: _ParameterGroup, topology: Topology) -> int:
    """Return the bytes of gradients that a rank sends.

    A ring all-reduce sends `2 (n - 1) / n` of the bytes. ZeRO 2 reduces after every micro-batch; DeepSpeed all-reduces its
    buckets under ZeRO too (`use_multi_rank_bucket_allreduce`, on by default).
    """
    times = topology.accumulation if topology.zero_stage == 2 else 1
    return 2 * group.parameters * topology.bytes_per.gradient * (group.copies - 1) // group.copies * times


def _all_gather_bytes(group: _ParameterGroup, topology: Topology) -> int:
    if not topology.zero_stage:
        return 0
    return group.parameters * topology.bytes_per.weight * (group.copies - 1) // group.copies


def _time(config: GPTConfig, topology: Topology, gpu: Hardware, utilisation: float) -> StepTime:
    groups, size = _parameter_groups(config, topology), topology.bytes_per
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
    moved = 2 * (size.moments + (size.master or size.weight)) + size.gradient + (size.weight if size.master else 0)
    optimizer = updated * moved / gpu.memory_bandwidth
    return StepTime(compute, all_to_all, max(0.0, reduction - overlapped), gathering, optimizer)


def _bandwidth(group: _ParameterGroup, topology: Topology, gpu: Hardware) -> float:
    """Return bytes/s of a ring over a group's copies, which uses the network card of every copy on a node.

    As in DeepSpeed, an expert-parallel group is `degree` consecutive ranks, and copies of an expert are `degree` ranks apart.
    """
    degree = topology.gpus // group.copies
    per_node = min(group.copies, max(1, gpu.gpus_per_node // degree))
    return gpu.nvlink if per_node == group.copies else min(gpu.nvlink, per_node * gpu.network)
