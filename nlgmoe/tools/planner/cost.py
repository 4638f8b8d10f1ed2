"""The cost model: what a training step takes in memory, communication and time, by arithmetic. Nothing is built or run.

    memory         weights + gradients + optimizer + activations + ZeRO's buckets, of one rank
    communication  bytes that one rank sends in one optimizer step
    step time      compute + all-to-all + gradient reduction beyond the last backward pass + weight gathering + optimizer

docs/scaling.md has every formula with its source and its assumptions, and how the model was checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from nlgmoe.config import GPTConfig, require_paper_parts
from nlgmoe.model.counting import count_parameters, expert_parameters, flops_per_token
from nlgmoe.monitoring.hardware import RESERVED, Hardware
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.planner.activation_memory import activation_bytes
from nlgmoe.tools.planner.roofline import Roofline, roofline
from nlgmoe.tools.planner.topology import Topology

UTILISATION = 0.44
"""Share of the peak that matrix products reach: Megatron-LM's 1.7B model on 32 A100s, 137 TFLOP/s (arXiv 2104.04473, table 1)."""

BUCKET = 200_000_000
"""Elements of a ZeRO reduction bucket: Lightning's default. Two exist, since reducing one overlaps with filling the other."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Gradients and activations are added, although they are largest at different moments.

    Attributes:
        weights: what the model computes with (and autocast's copies).
        gradients: of the weights.
        optimizer: Adam's moments and fp32 master weights.
        activations: see `activation_memory.py`.
        buckets: ZeRO's reduction buffers.
        step: fp32 copies of the gradients that ZeRO's step makes, when activations and buckets are gone.
        host: optimizer state in the host's memory, if offloaded; not part of `total`.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buckets: int
    step: int
    host: int

    @property
    def total(self) -> int:
        """Bytes of the GPU's memory."""
        return self.weights + self.gradients + self.optimizer + max(self.activations + self.buckets, self.step)


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends to others in one optimizer step.

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

    @property
    def total(self) -> int:
        """All of it."""
        return self.all_to_all + self.dense_gradients + self.expert_gradients + self.gathered_weights


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they are spent on; the parts follow each other."""

    compute: float
    all_to_all: float
    gradients: float
    gathered_weights: float
    optimizer: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.all_to_all + self.gradients + self.gathered_weights + self.optimizer


@dataclass(frozen=True)
class Cost:
    """What a step costs. `samples_per_second` and `tokens_per_second` are of all ranks, `roofline` is of a micro-batch."""

    memory: Memory
    communication: Communication
    time: StepTime
    roofline: Roofline
    samples_per_second: float
    tokens_per_second: float
    fits: bool


@dataclass(frozen=True)
class _Share:
    """Parameters that live on a rank and are replicated on `copies` ranks, of which `near` are on one node."""

    parameters: int
    copies: int
    near: int


def estimate(config: GPTConfig, topology: Topology, gpu: Hardware, utilisation: float = UTILISATION) -> Cost:
    """The cost of one optimizer step of `config` laid out as `topology`.

    Args:
        config: the model; sequences are as long as `config.seq_len`.
        topology: the ranks.
        gpu: what a rank runs on.
        utilisation: share of the peak FLOP/s that the matrix products reach, in (0, 1].

    Raises:
        ValueError: `utilisation` is out of range, or the model has a router or an expert of a user's own.
    """
    require_paper_parts(config, "the cost model knows")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation={utilisation} must be above 0 and at most 1")
    shares = _shares(config, topology, gpu)
    memory = _memory(config, topology, shares)
    communication = _communication(config, topology, shares)
    time = _time(config, topology, gpu, utilisation, shares)
    samples = topology.global_batch_size / time.total
    fits = memory.total <= gpu.memory - RESERVED
    parts = roofline(config, topology, gpu, time.all_to_all / topology.accumulation)
    return Cost(memory, communication, time, parts, samples, samples * config.seq_len, fits)


def _shares(config: GPTConfig, topology: Topology, gpu: Hardware) -> list[_Share]:
    """The dense part, then the experts of every MoE layer. Ranks of an expert-parallel group are neighbours, as DeepSpeed
    numbers them; copies of an expert are `degree` ranks apart."""
    count = count_parameters(config)
    shares = [_Share(count.total - count.experts, topology.gpus, min(topology.gpus, gpu.gpus_per_node))]
    for experts, degree in zip(experts_per_layer(config), topology.degrees(config), strict=True):
        if experts:
            copies = topology.gpus // degree
            near = min(copies, max(1, gpu.gpus_per_node // degree))
            shares.append(_Share(experts // degree * expert_parameters(config), copies, near))
    return shares


def _memory(config: GPTConfig, topology: Topology, shares: list[_Share]) -> Memory:
    """ZeRO 1 and 2 divide an optimizer state over the ranks that replicate its weights; ZeRO 2 the gradients too."""
    size = topology.bytes_per
    held = sum(share.parameters for share in shares)
    divided = sum(-(-share.parameters // share.copies) for share in shares)  # rounded up: ZeRO pads
    count = count_parameters(config)
    uncast = count.norms + count.router + config.seq_len * config.hidden_size  # what autocast leaves in fp32
    optimizer = (divided if topology.zero_stage else held) * (size.master + size.moments)
    in_fp32 = size.accumulated > size.gradient  # the step needs no copy
    return Memory(
        weights=held * size.weight + (held - uncast) * size.cast,
        gradients=(divided if topology.zero_stage == 2 else held) * size.accumulated,
        optimizer=0 if topology.offload_optimizer else optimizer,
        activations=activation_bytes(config, topology),
        buckets=2 * BUCKET * size.gradient if topology.zero_stage and topology.gpus > 1 else 0,
        step=4 * divided if topology.zero_stage and not topology.offload_optimizer and not in_fp32 else 0,
        host=optimizer if topology.offload_optimizer else 0,
    )


def _communication(config: GPTConfig, topology: Topology, shares: list[_Share]) -> Communication:
    dense, *experts = [_gradient_bytes(share, topology) for share in shares]
    return Communication(
        all_to_all=sum(_exchanged(config, topology, degree) for degree in topology.degrees(config)),
        dense_gradients=dense,
        expert_gradients=sum(experts),
        gathered_weights=sum(_gathered_bytes(share, topology) for share in shares),
    )


def _exchanged(config: GPTConfig, topology: Topology, degree: int) -> int:
    """Bytes of one MoE layer's all-to-alls: every assignment's row goes out and comes back, forward and backward, and once
    more where the block is computed again. `1 / degree` of them stays on the rank."""
    if degree < 2:
        return 0
    assert config.moe is not None
    passes = 6 if topology.activation_checkpointing else 4
    rows = topology.micro_batch_size * config.seq_len * config.moe.top_k * topology.accumulation
    return passes * rows * config.hidden_size * topology.bytes_per.compute * (degree - 1) // degree


def _gradient_bytes(share: _Share, topology: Topology) -> int:
    """A ring all-reduce sends `2 (n - 1) / n` of the bytes. ZeRO 2 reduces after every micro-batch; DeepSpeed's buckets are
    all-reduced under ZeRO too (`use_multi_rank_bucket_allreduce`, on by default)."""
    times = topology.accumulation if topology.zero_stage == 2 else 1
    return 2 * share.parameters * topology.bytes_per.gradient * (share.copies - 1) // share.copies * times


def _gathered_bytes(share: _Share, topology: Topology) -> int:
    if not topology.zero_stage:
        return 0
    return share.parameters * topology.bytes_per.weight * (share.copies - 1) // share.copies


def _time(config: GPTConfig, topology: Topology, gpu: Hardware, utilisation: float, shares: list[_Share]) -> StepTime:
    size = topology.bytes_per
    tokens = topology.micro_batch_size * config.seq_len * topology.accumulation  # of one rank
    peak = (gpu.fp32_flops if size.compute == 4 else gpu.half_flops) * utilisation
    forward = flops_per_token(config) / 3
    again = forward - 2 * config.hidden_size * config.vocab_size if topology.activation_checkpointing else 0.0
    compute = tokens * (3 * forward + again) / peak

    exchange = 0.0
    for degree in topology.degrees(config):
        sent = _exchanged(config, topology, degree)
        far = max(0, degree - gpu.gpus_per_node) / max(1, degree - 1)  # share of what is sent that leaves the node
        exchange += max(sent * (1 - far) / gpu.nvlink, sent * far / gpu.network)

    reduction = sum(_gradient_bytes(share, topology) / _bandwidth(share, gpu) for share in shares)
    # Reducing overlaps with the backward pass: of every micro-batch under ZeRO 2, else of the last.
    backward = compute * (2 * forward + again) / (3 * forward + again)
    hidden = backward if topology.zero_stage == 2 else backward / topology.accumulation
    gathering = sum(_gathered_bytes(share, topology) / _bandwidth(share, gpu) for share in shares)

    updated = sum(share.parameters / (share.copies if topology.zero_stage else 1) for share in shares)
    # Read and write the state; read the gradient, write the working weight.
    moved = 2 * (size.moments + (size.master or size.weight)) + size.gradient + (size.weight if size.master else 0)
    return StepTime(compute, exchange, max(0.0, reduction - hidden), gathering, updated * moved / gpu.memory_bandwidth)


def _bandwidth(share: _Share, gpu: Hardware) -> float:
    """Bytes/s of a ring over a share's copies: each of the `near` members on a node brings its network card."""
    return gpu.nvlink if share.near == share.copies else min(gpu.nvlink, share.near * gpu.network)
