"""The layout of a run over ranks and the bytes per value: with `GPTConfig`, the input of the cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nlgmoe.config import GPTConfig
from nlgmoe.pyramid import expert_parallel_degree, experts_per_layer
from nlgmoe.validation import SettingError, require_at_least

Precision = Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"]


@dataclass(frozen=True)
class BytesPer:
    """Bytes per parameter of training state, and per value of activations.

    Attributes:
        weight: weights used in computation.
        gradient: gradients, as reduced over ranks.
        accumulated: gradients, as accumulated over micro-batches.
        master: the optimizer's fp32 copy of the weights; 0 if it updates the weights themselves.
        moments: Adam's two moments.
        cast: autocast's half-precision copies of weight matrices, saved for the backward pass.
        residual: values of the residual stream.
        compute: values inside attention, feed-forward layers and experts.
    """

    weight: int
    gradient: int
    accumulated: int
    master: int
    moments: int
    cast: int
    residual: int
    compute: int


@dataclass(frozen=True)
class Topology:
    """The layout of a run over ranks.

    Attributes:
        gpus: ranks; all are data-parallel.
        expert_parallel_size: upper bound of each MoE layer's expert-parallel degree (`pyramid.expert_parallel_degree`).
        zero_stage: 1 or 2; 0: without ZeRO, as `ddp`.
        micro_batch_size: sequences per rank and forward pass.
        global_batch_size: sequences per optimizer step over all ranks; a multiple of `micro_batch_size * gpus`.
        activation_checkpointing: each block is recomputed in the backward pass.
        precision: Lightning's name.
        deepspeed: the run uses DeepSpeed's engine, which computes with half-precision weights under `*-mixed` too. Without it
            `*-mixed` is autocast over fp32 weights.
        offload_optimizer: master weights and moments are in host memory (ZeRO-Offload).
        loss_chunk_size: tokens whose logits are computed at a time.
        seq_len: tokens of a sequence; None: as many as the model reads.
        muon: Muon steps the matrices of hidden layers, with one moment instead of two.
    """

    gpus: int = 1
    expert_parallel_size: int = 1
    zero_stage: int = 0
    micro_batch_size: int = 8
    global_batch_size: int = 8
    activation_checkpointing: bool = False
    precision: Precision = "bf16-mixed"
    deepspeed: bool = True
    offload_optimizer: bool = False
    loss_chunk_size: int = 1024
    seq_len: int | None = None
    muon: bool = False

    def __post_init__(self) -> None:
        sizes = ("gpus", "expert_parallel_size", "micro_batch_size", "global_batch_size", "loss_chunk_size")
        require_at_least(1, self, *sizes)
        if self.zero_stage not in (0, 1, 2):
            raise SettingError(
                f"zero_stage={self.zero_stage}: choose 0, 1 or 2 (DeepSpeed's stage 3 has no expert parallelism)"
            )
        if self.expert_parallel_size > self.gpus:
            raise SettingError(f"expert_parallel_size={self.expert_parallel_size} is above gpus={self.gpus}; lower it")
        if self.global_batch_size % (self.micro_batch_size * self.gpus):
            from nlgmoe.data.sampling import micro_batches_per_step  # its package takes seconds to import

            # Raises what training does.
            micro_batches_per_step(self.global_batch_size, self.micro_batch_size, self.gpus)
        if not self.deepspeed and (self.zero_stage or self.expert_parallel_size > 1 or self.offload_optimizer):
            raise SettingError("ZeRO, expert parallelism and offloading need nlgmoe.ExpertParallelStrategy")
        if self.muon and self.deepspeed:
            raise SettingError(
                "model.optimizer.muon: ExpertParallelStrategy (ZeRO) has no Muon; use trainer.strategy=ddp or auto"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.gpus)

    @property
    def bytes_per(self) -> BytesPer:
        """Bytes per parameter and per activation for this precision and engine."""
        if self.precision == "32-true":
            copies = 4 if self.zero_stage else 0  # ZeRO copies its shard of fp32 weights too
            return BytesPer(4, 4, 4, copies, 8, 0, 4, 4)
        if self.deepspeed:
            in_fp32 = self.zero_stage == 2 and not self.offload_optimizer  # see ExpertParallelStrategy
            return BytesPer(2, 2, 4 if in_fp32 else 2, 4, 8, 0, 2, 2)
        if self.precision.endswith("-mixed"):
            return BytesPer(4, 4, 4, 0, 8, 2, 4, 2)
        return BytesPer(2, 2, 2, 0, 4, 0, 2, 2)

    def communicators(self, config: GPTConfig) -> list[int]:
        """Return the ranks of each process group with a communicator: of all ranks, and of the experts of each degree."""
        degrees = sorted(set(self.degrees(config)) - {0, 1})
        sizes = [self.gpus, *degrees, *(self.gpus // degree for degree in degrees)]
        return sorted((size for size in sizes if size > 1), reverse=True)

    def length(self, config: GPTConfig) -> int:
        """Return the tokens of a sequence."""
        return config.seq_len if self.seq_len is None else self.seq_len

    def degrees(self, config: GPTConfig) -> list[int]:
        """Return the expert-parallel degree of every block, in order; 0 for a dense block."""
        return [
            expert_parallel_degree(experts, self.gpus, self.expert_parallel_size) if experts else 0
            for experts in experts_per_layer(config)
        ]
