"""The layout of a run over ranks, as train.py's settings have it: the input of the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nlgmoe.config import GPTConfig
from nlgmoe.optim.muon import MuonConfig
from nlgmoe.pyramid import expert_parallel_degree, experts_per_layer
from nlgmoe.validation import SettingError, require, require_at_least

Precision = Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true"]


@dataclass(frozen=True)
class BytesPer:
    """Bytes per parameter of training state, and per value of activations."""

    weight: int  # weights used in computation
    gradient: int  # gradients, as reduced over ranks
    accumulated: int  # gradients, as accumulated over micro-batches
    master: int  # the optimizer's fp32 copy of the weights; 0 if it updates the weights themselves
    moments: int  # Adam's two moments
    cast: int  # autocast's half-precision copies of weight matrices, saved for the backward pass
    residual: int  # values of the residual stream
    compute: int  # values inside attention, feed-forward layers and experts


@dataclass(frozen=True)
class Topology:
    """The layout of a run over ranks."""

    gpus: int = 1  # ranks; all are data-parallel
    expert_parallel_size: int = 1  # upper bound of each MoE layer's degree (`placement.expert_parallel_degree`)
    zero_stage: int = 0  # 1 or 2; 0: without ZeRO, as `ddp`
    micro_batch_size: int = 8  # sequences per rank and forward pass
    global_batch_size: int = 8  # sequences per optimizer step over all ranks; a multiple of `micro_batch_size * gpus`
    activation_checkpointing: bool = False  # each block is recomputed in the backward pass
    precision: Precision = "bf16-mixed"  # Lightning's name
    deepspeed: bool = True  # its engine, with half-precision weights under `*-mixed`; else autocast over fp32
    offload_optimizer: bool = False  # master weights and moments are in host memory (ZeRO-Offload)
    loss_chunk_size: int = 1024  # tokens whose logits are computed at a time
    seq_len: int | None = None  # tokens of a sequence; None: as many as the model reads
    muon: MuonConfig | None = None  # steps the matrices of hidden layers, with one moment instead of two

    def __post_init__(self) -> None:
        sizes = ("gpus", "expert_parallel_size", "micro_batch_size", "global_batch_size", "loss_chunk_size")
        require_at_least(1, self, *sizes)
        if self.zero_stage not in (0, 1, 2):
            reason = "DeepSpeed's stage 3 has no expert parallelism"
            raise SettingError(f"zero_stage={self.zero_stage}: choose 0, 1 or 2 ({reason})")
        if self.expert_parallel_size > self.gpus:
            raise SettingError(f"expert_parallel_size={self.expert_parallel_size} is above gpus={self.gpus}; lower it")
        if self.global_batch_size % (self.micro_batch_size * self.gpus):
            from nlgmoe.data.sampling import micro_batches_per_step  # its package takes seconds to import

            # Raises what training does.
            micro_batches_per_step(self.global_batch_size, self.micro_batch_size, self.gpus)
        if not self.deepspeed and (self.zero_stage or self.expert_parallel_size > 1 or self.offload_optimizer):
            raise SettingError("ZeRO, expert parallelism and offloading need nlgmoe.ExpertParallelStrategy")

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

    def length(self, config: GPTConfig) -> int:
        """Return the tokens of a sequence."""
        return config.seq_len if self.seq_len is None else self.seq_len

    def degrees(self, config: GPTConfig) -> list[int]:
        """Return the expert-parallel degree of every block, in order; 0 for a dense block."""
        return [
            expert_parallel_degree(experts, self.gpus, self.expert_parallel_size) if experts else 0
            for experts in experts_per_layer(config)
        ]


def read_settings(paths: Sequence[str]) -> tuple[GPTConfig, dict[str, Any]]:
    """Read the model and train.py's settings; a checkpoint or a run's folder has no settings."""
    if len(paths) == 1 and (Path(paths[0]).is_dir() or paths[0].endswith(".ckpt")):
        from nlgmoe.checkpoint.run_checkpoints import choose_checkpoint  # imports Lightning, which takes seconds

        return choose_checkpoint(paths[0], kinds=()).config, {}
    # train.py's parser, for the same defaults and errors; its imports take seconds.
    from nlgmoe.experiment import parse_config

    settings = parse_config(paths)
    return GPTConfig.from_dict(settings["model"]["config"]), settings


def layout(settings: dict[str, Any], given: dict[str, Any]) -> Topology:
    """Return the topology of train.py's `settings`, overridden by the options `given` on the command line."""
    trainer, data, module = (settings.get(part, {}) for part in ("trainer", "data", "model"))
    strategy = trainer.get("strategy") or "auto"
    strategy = {"class_path": strategy} if isinstance(strategy, str) else strategy
    name, init = strategy["class_path"], strategy.get("init_args") or {}
    remedy = "train.py refuses it; write {class_path: nlgmoe.ExpertParallelStrategy, init_args: {stage: 2}}"
    require("deepspeed" not in name.lower(), f"trainer.strategy={name}: {remedy}")
    muon = (module.get("optimizer") or {}).get("muon")
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
        "muon": None if muon is None else MuonConfig(**muon),
        "precision": trainer.get("precision") or ("bf16-mixed" if no_hardware else "32-true"),
    } | given
    short, known = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}, get_args(Precision)  # Lightning's names
    values["precision"] = precision = short.get(str(values["precision"]), values["precision"])
    choice = f"is not supported by the cost model; choose one of {', '.join(known)}"
    require(precision in known, f"precision={precision} {choice}")
    if "gpus" in given and "expert_parallel_size" not in given:
        # Files for a larger cluster than --gpus: limit the strategy's bound.
        values["expert_parallel_size"] = min(values["expert_parallel_size"], given["gpus"])
    accumulation = trainer.get("accumulate_grad_batches") or 1
    global_batch = data.get("global_batch_size") or values["micro_batch_size"] * values["gpus"] * accumulation
    values.setdefault("global_batch_size", global_batch)
    # --gpus without a strategy: assume this project's strategy. For `devices` in the files, "auto" is ddp, as in train.py.
    assumed = name == "auto" and given.get("gpus", 1) > 1
    engine = "ExpertParallel" in name or assumed
    values["deepspeed"] = engine or values["zero_stage"] > 0 or values["expert_parallel_size"] > 1
    values["zero_stage"] = max(values["zero_stage"], int(values["deepspeed"]))  # the strategy takes 0 as 1
    return Topology(**values)


def _named_devices(devices: Any) -> int | None:
    """Return the ranks per node of Lightning's `devices`: a number, indices, or text of either; None for "auto" and -1."""
    text = "auto" if devices is None else str(devices)
    words = devices if isinstance(devices, list) else text.strip("[] ").rstrip(",").split(",")
    if words in (["auto"], ["-1"], [-1]):
        return None
    if not all(str(word).strip().isdigit() for word in words):
        raise SettingError(f"trainer.devices={devices} is no number of GPUs and no list of indices; correct it")
    number = len(words) if isinstance(devices, list) or "," in str(devices) else int(words[0])
    require(number > 0, f"trainer.devices={devices} is no rank; give at least 1")
    return number
