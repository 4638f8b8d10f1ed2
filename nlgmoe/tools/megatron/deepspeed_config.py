"""DeepSpeed's configuration of a launch: ZeRO, precision and its loss scale, clipping, the curriculum."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from nlgmoe.tools.megatron.arguments import Arguments, is_count
from nlgmoe.tools.megatron.launch import Launch

# The tutorial's ds_config_gpt_TEMPLATE.json, for a configuration that is not known.
TEMPLATE_FP16 = {"initial_scale_power": 11, "loss_scale_window": 500, "hysteresis": 2}
# Megatron's own loss scaler, without DeepSpeed (megatron/arguments.py).
MEGATRON_FP16 = {"initial_scale_power": 32, "loss_scale_window": 1000, "hysteresis": 2}
# DeepSpeed's own defaults (deepspeed/runtime/constants.py) for what the block leaves out
SCALE = {"initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
DYNAMIC = "fp16's loss scale is dynamic here, and may fall to 1"

SUBJECT = "the DeepSpeed configuration"

# What changes no number of a run: speed, memory, reports. Megatron counts the micro-batches of a step itself.
_WITHOUT_EFFECT = {
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "disable_python_gc"),
    *("tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler", "comms_logger", "timers"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather", "prescale_gradients"),
    *("gradient_predivide_factor", "activation_checkpointing", "aio", "checkpoint", "dataloader_drop_last"),
    *("gradient_accumulation_steps", "sparse_gradients", "use_data_before_expert_parallelism"),
}
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu")
_READ = {
    *("zero_optimization", "fp16", "bf16", "bfloat16", "curriculum_learning", "gradient_clipping"),
    *_BATCH,
}


@dataclass(frozen=True)
class Curriculum:
    """An enabled section `curriculum_learning`.

    Attributes:
        kind: `curriculum_type` and `schedule_type`; only "seqlen" and "fixed_linear" can be had here.
        start: `min_difficulty`, in tokens.
        end: `max_difficulty`, in tokens.
        steps: `total_curriculum_step`.
        increment: `difficulty_step`, in tokens.
    """

    kind: tuple[str, str]
    start: int
    end: int
    steps: int
    increment: int


@dataclass(frozen=True)
class DeepSpeedConfig:
    """DeepSpeed's configuration; None where it is not known.

    Attributes:
        fp16_scale: `initial_scale_power`, `loss_scale_window`, `hysteresis`.
        batch: `train_batch_size`, `train_micro_batch_size_per_gpu`, which must agree with the flags.
        source: its origin, for comments.
    """

    stage: int | None = None
    fp16: bool | None = None
    bf16: bool | None = None
    curriculum: Curriculum | None = None
    offload: bool = False
    gradient_clipping: float | None = None
    fp16_scale: dict[str, int] | None = None
    batch: dict[str, int | None] = field(default_factory=dict)
    source: str = ""


# The tutorial's template, as far as `sed` fills it in.
_TEMPLATE = """{
  "zero_optimization": {"stage": ZERO_STAGE},
  "fp16": {"enabled": CONFIG_FP16_ENABLED},
  "bf16": {"enabled": CONFIG_BF16_ENABLED},
  "curriculum_learning": {
    "enabled": CONFIG_CL_ENABLED, "curriculum_type": "seqlen",
    "min_difficulty": CONFIG_CL_MIN, "max_difficulty": CONFIG_CL_MAX,
    "schedule_type": "fixed_linear", "schedule_config": {"total_curriculum_step": CONFIG_CL_DURATION, "difficulty_step": 8}
  }
}"""
_PLACEHOLDER = re.compile(r"ZERO_STAGE|CONFIG_\w+")


def read_deepspeed_config(launch: Launch, arguments: Arguments) -> DeepSpeedConfig:
    """Read DeepSpeed's configuration, or the values with which `sed` fills in a template that is not there."""
    if launch.deepspeed_config is not None:
        return _parse(launch.deepspeed_config, SUBJECT, arguments)
    if not set(_PLACEHOLDER.findall(_TEMPLATE)) & launch.substitutions.keys():
        return DeepSpeedConfig()
    filled = _PLACEHOLDER.sub(lambda match: launch.substitutions.get(match[0]) or "null", _TEMPLATE)
    config = _parse(filled, "as sed fills the DeepSpeed configuration", arguments)
    return replace(config, gradient_clipping=None, fp16_scale=None)  # not in the part that is known


def _parse(text: str, source: str, arguments: Arguments) -> DeepSpeedConfig:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        arguments.problem(SUBJECT, f"is no JSON ({error}); correct it")
        return DeepSpeedConfig()
    if not isinstance(config, dict):
        arguments.problem(SUBJECT, "is no JSON object; correct it")
        return DeepSpeedConfig()
    for name in config.keys() - _WITHOUT_EFFECT - _READ:
        if _is_on(config[name]):
            arguments.problem(SUBJECT, f"has {name}, which cannot be had here; remove it")
    sections = ("zero_optimization", "fp16", "bf16" if "bf16" in config else "bfloat16", "curriculum_learning")
    zero, fp16, bf16, curriculum = (_section(config, name, arguments) for name in sections)
    scale = SCALE | {name: fp16[name] for name in SCALE if fp16.get(name) is not None}
    batch = {name: config.get(name) for name in _BATCH}
    for name, value in {"stage": zero.get("stage"), **scale, **batch}.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            arguments.problem(SUBJECT, f"has {name}={json.dumps(value)}, not a whole number from 0 on; correct it")
    for name, value in {"loss_scale": 0, "min_loss_scale": 1}.items():
        if fp16.get("enabled") is True and fp16.get(name) not in (None, value):
            arguments.problem(SUBJECT, f"has {name}={json.dumps(fp16[name])}: {DYNAMIC}; remove it")
    clipping = config.get("gradient_clipping", 0.0)
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or not 0 <= clipping < math.inf:
        arguments.problem(SUBJECT, f"has gradient_clipping={json.dumps(clipping)}, not a number from 0 on; correct it")
    return DeepSpeedConfig(
        stage=zero.get("stage", 0),
        fp16=_switch(fp16, sections[1], arguments),
        bf16=_switch(bf16, sections[2], arguments),
        curriculum=_curriculum(curriculum, arguments) if _switch(curriculum, sections[3], arguments) else None,
        offload=(_section(zero, "offload_optimizer", arguments).get("device") or "none") != "none"
        or bool(zero.get("cpu_offload")),
        gradient_clipping=clipping,
        fp16_scale=scale,
        batch=batch,
        source=source,
    )


def _is_on(value: Any) -> bool:
    """Return False for what DeepSpeed does not act on: false, null, an empty section, one with `"enabled": false`."""
    return bool(value.get("enabled", True)) if value and isinstance(value, dict) else bool(value)


def _switch(section: dict[str, Any], name: str, arguments: Arguments) -> bool | None:
    """Return `enabled`: false where it is absent, None where it is null, as for what `sed` leaves out."""
    value = section.get("enabled", False)
    if value is None or isinstance(value, bool):
        return value
    arguments.problem(SUBJECT, f"has {name} enabled={json.dumps(value)}, not true or false; correct it")
    return None


def _section(config: dict[str, Any], name: str, arguments: Arguments) -> dict[str, Any]:
    """Return an object in the configuration; empty if it is absent, null, or of another type, which is a problem."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        arguments.problem(SUBJECT, f"has {name}={json.dumps(found)}, no object; correct it")
        return {}
    return found


def _curriculum(section: dict[str, Any], arguments: Arguments) -> Curriculum | None:
    """Return the values of an enabled section; None with a problem."""
    values = section | _section(section, "schedule_config", arguments)
    names = ("min_difficulty", "max_difficulty", "total_curriculum_step", "difficulty_step")
    unusable = [name for name in names if not is_count(str(values.get(name)))]
    if unusable:
        arguments.problem(
            SUBJECT,
            f"turns the curriculum on, and its {unusable[0]} is {values.get(unusable[0])}; give a number, or turn it off",
        )
        return None
    kind = str(values.get("curriculum_type")), str(values.get("schedule_type"))
    return Curriculum(kind, *(int(values[name]) for name in names))
