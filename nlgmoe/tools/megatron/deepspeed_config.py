"""The file of `--deepspeed_config`: ZeRO, precision and loss scale, clipping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from nlgmoe.tools.megatron.flags import Arguments

SUBJECT = "the DeepSpeed configuration"

# What changes no number of a run: speed, memory, reports. Megatron counts the micro-batches of a step itself.
_WITHOUT_EFFECT = {
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "disable_python_gc"),
    *("tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler", "comms_logger", "timers"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather", "prescale_gradients"),
    *("gradient_predivide_factor", "activation_checkpointing", "aio", "checkpoint", "dataloader_drop_last"),
    *("gradient_accumulation_steps", "sparse_gradients", "use_data_before_expert_parallelism"),
}
_BATCH = {"train_batch_size": "--global-batch-size", "train_micro_batch_size_per_gpu": "--micro-batch-size"}
_READ = {"zero_optimization", "fp16", "bf16", "bfloat16", "curriculum_learning", "gradient_clipping", *_BATCH}
# DeepSpeed's own defaults (deepspeed/runtime/constants.py) for what the block fp16 leaves out
_SCALE = {"initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}


class DeepSpeedConfig(NamedTuple):
    """What is read of DeepSpeed's configuration."""

    stage: int
    offload: bool
    gradient_clipping: float
    fp16_scale: dict[str, int]  # initial_scale_power, loss_scale_window, hysteresis


def read_deepspeed_config(arguments: Arguments, notes: list[str]) -> DeepSpeedConfig | None:
    """Read the file of `--deepspeed_config`, relative to the current folder; None where it is not there.

    Args:
        arguments: flags of the launch; what cannot be translated is added to their problems.
        notes: gets a sentence on the file.
    """
    name = arguments.value("--deepspeed_config")
    if name is None:
        return None
    if not Path(name).is_file() or not Path(name).stat().st_size:
        notes.append(
            f"--deepspeed_config {name} is not there, or empty: its clipping and offload, if any, are missing."
        )
        return None
    notes.append(f"--deepspeed_config {name} was read here.")
    try:
        config = json.loads(Path(name).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
        return _parse(config, arguments)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        arguments.add_problem(SUBJECT, f"{name} cannot be read ({error}); correct it")
        return None


def _parse(config: dict[str, Any], arguments: Arguments) -> DeepSpeedConfig:
    def refuse(message: str) -> None:
        arguments.add_problem(SUBJECT, message)

    for name in config.keys() - _WITHOUT_EFFECT - _READ:
        value = config[name]
        if value and (not isinstance(value, dict) or value.get("enabled", True)):
            refuse(f"has {name}, which is not available here; remove it")
    for name, flag in _BATCH.items():
        given = arguments.value(flag)
        if config.get(name) not in (None, "auto", given):
            refuse(f"has {name}={config[name]}, {flag} is {given}; make them agree")
    zero, fp16 = config.get("zero_optimization") or {}, config.get("fp16") or {}
    bf16 = config.get("bf16") or config.get("bfloat16") or {}
    if (config.get("curriculum_learning") or {}).get("enabled"):
        refuse(
            "has curriculum_learning, whose sequences grow by steps there and by tokens here; turn it off, and set "
            "model.curriculum (docs/growth.md)"
        )
    if fp16.get("enabled") and (fp16.get("loss_scale") or fp16.get("min_loss_scale") not in (None, 1)):
        refuse("has a loss_scale or a min_loss_scale: fp16's loss scale is dynamic here, and may fall to 1; remove it")
    stage, clipping = zero.get("stage", 0), config.get("gradient_clipping") or 0.0
    if stage not in (0, 1, 2):
        refuse(f"has ZeRO stage {stage}, which is not possible with experts; use 0, 1 or 2")
        stage = 0
    for flag, section in (("fp16", fp16), ("bf16", bf16)):
        if bool(section.get("enabled")) != arguments.has(f"--{flag}"):
            state = "on" if section.get("enabled") else "off"
            refuse(f"has {flag} {state}, and --{flag} does not say so; make them agree")
    return DeepSpeedConfig(
        stage=int(stage),
        offload=(zero.get("offload_optimizer") or {}).get("device", "none") != "none" or bool(zero.get("cpu_offload")),
        gradient_clipping=float(clipping),
        fp16_scale=_SCALE | {name: int(fp16[name]) for name in _SCALE if fp16.get(name) is not None},
    )
