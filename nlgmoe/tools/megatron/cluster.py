"""Nodes and GPUs of a launch, and its DeepSpeed configuration: what Megatron's own flags do not say."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from nlgmoe.tools.megatron.arguments import Arguments
from nlgmoe.tools.megatron.launch import Launch

# The tutorial's ds_config_gpt_TEMPLATE.json, for a configuration that is not known.
TEMPLATE_FP16 = {"initial_scale_power": 11, "loss_scale_window": 500, "hysteresis": 2}
# Megatron's own loss scaler, without DeepSpeed (megatron/arguments.py).
MEGATRON_FP16 = {"initial_scale_power": 32, "loss_scale_window": 1000, "hysteresis": 2}
# DeepSpeed's own defaults (deepspeed/runtime/constants.py) for what the block leaves out
SCALE = {"initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
DYNAMIC = "fp16's loss scale is dynamic here, and may fall to 1"

_SUBJECT = "the DeepSpeed configuration"
_DEVICE_FLAGS = ("--num_gpus", "--nproc_per_node", "--nproc-per-node")
_NODE_FLAGS = ("--num_nodes", "--nnodes")


@dataclass(frozen=True)
class Cluster:
    """GPUs of each node, nodes, and a comment where they are guessed."""

    devices: int
    nodes: int
    comment: str = ""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.devices * self.nodes


def read_cluster(launch: Launch, arguments: Arguments) -> Cluster | None:
    """Return the launcher's counts, or those of the variables that the tutorial's scripts keep them in; None with a problem."""
    devices, nodes = (_given(names, launch, arguments) for names in (_DEVICE_FLAGS, _NODE_FLAGS))
    if arguments.problems and 0 in (devices, nodes):
        return None
    programs = [word.rpartition("/")[2] for word in launch.launcher]
    # torchrun starts one process if it is not told how many
    if devices is None and {"torchrun", "torch.distributed.launch", "torch.distributed.run"} & set(programs):
        devices = 1
    if devices is not None:
        return Cluster(devices, nodes or 1)
    if programs[:1] in (["python"], ["python3"]):
        return Cluster(1, 1, "started by python alone: one process")
    name = next((name for name in ("NUM_GPUS", "world_size") if launch.variables.get(name)), None)
    if name is None:
        arguments.problem(
            programs[0] if programs else "the launch",
            "does not say how many GPUs; add --num_gpus and --num_nodes, or to --run-script --variables.NUM_GPUS",
        )
        return None
    total = _count(launch.variables[name], name, arguments)
    if not total:
        return None
    per_node = launch.variables.get("NUM_GPUS_PERNODE", "")
    known = int(per_node) if per_node.isdigit() else None
    devices = known or (total // nodes if nodes else min(total, 8))
    if devices < 1 or total % devices:
        arguments.problem(f"{name}={total}", f"is no multiple of {devices} GPUs a node; correct it")
        return None
    return Cluster(devices, total // devices, "" if known else f"{name}={total}; 8 to a node is an assumption")


def _given(names: tuple[str, ...], launch: Launch, arguments: Arguments) -> int | None:
    """Return the last of these flags of the launcher, or among Megatron's; 0 with a problem."""
    words = [part for word in launch.launcher for part in word.split("=", 1)]
    found = [(name, value) for name, value in pairwise(words) if name in names]
    found += [(name, arguments.uses[name].values[0]) for name in names if name in arguments.uses]
    return _count(found[-1][1], " ".join(found[-1]), arguments) if found else None


def _count(text: str, subject: str, arguments: Arguments) -> int:
    if text.isdigit() and int(text) > 0:
        return int(text)
    arguments.problem(subject, f"is {text or 'empty'}, not a count; correct it")
    return 0


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
        source: its origin, for comments.
    """

    stage: int | None = None
    fp16: bool | None = None
    bf16: bool | None = None
    curriculum: Curriculum | None = None
    offload: bool = False
    gradient_clipping: float | None = None
    fp16_scale: dict[str, int] | None = None
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
        return _parse(launch.deepspeed_config, _SUBJECT, arguments)
    if not set(_PLACEHOLDER.findall(_TEMPLATE)) & launch.substitutions.keys():
        return DeepSpeedConfig()
    filled = _PLACEHOLDER.sub(lambda match: launch.substitutions.get(match[0]) or "null", _TEMPLATE)
    config = _parse(filled, "as sed fills the DeepSpeed configuration", arguments)
    return replace(config, gradient_clipping=None, fp16_scale=None)  # not in the part that is known


def _parse(text: str, source: str, arguments: Arguments) -> DeepSpeedConfig:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        arguments.problem(_SUBJECT, f"is no JSON ({error}); correct it")
        return DeepSpeedConfig()
    if not isinstance(config, dict):
        arguments.problem(_SUBJECT, "is no JSON object; correct it")
        return DeepSpeedConfig()
    sections = ("zero_optimization", "fp16", "curriculum_learning")
    zero, fp16, curriculum = (_section(config, name, arguments) for name in sections)
    scale = SCALE | {name: fp16[name] for name in SCALE if fp16.get(name) is not None}
    stage = zero.get("stage", 0)
    for name, value in {"stage": stage, **scale}.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            arguments.problem(_SUBJECT, f"has {name}={json.dumps(value)}, not a whole number from 0 on; correct it")
    if fp16.get("enabled") is True:
        for name, dynamic in {"loss_scale": 0, "min_loss_scale": 1}.items():
            if fp16.get(name) not in (None, dynamic):
                arguments.problem(_SUBJECT, f"has {name}={json.dumps(fp16[name])}: {DYNAMIC}; remove it")
    return DeepSpeedConfig(
        stage=stage,
        fp16=fp16.get("enabled", False),
        bf16=_section(config, "bf16" if "bf16" in config else "bfloat16", arguments).get("enabled", False),
        curriculum=_curriculum(curriculum, arguments) if curriculum.get("enabled") else None,
        offload=_section(zero, "offload_optimizer", arguments).get("device", "none") != "none"
        or zero.get("cpu_offload", False),
        gradient_clipping=config.get("gradient_clipping", 0.0),
        fp16_scale=scale,
        source=source,
    )


def _section(config: dict[str, Any], name: str, arguments: Arguments) -> dict[str, Any]:
    """Return an object in the configuration; empty if it is absent, null, or of another type, which is a problem."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        arguments.problem(_SUBJECT, f"has {name}={json.dumps(found)}, no object; correct it")
        return {}
    return found


def _curriculum(section: dict[str, Any], arguments: Arguments) -> Curriculum | None:
    """Return the values of an enabled section; None with a problem."""
    values = section | _section(section, "schedule_config", arguments)
    names = ("min_difficulty", "max_difficulty", "total_curriculum_step", "difficulty_step")
    unusable = [name for name in names if not str(values.get(name)).isdigit()]
    if unusable:
        arguments.problem(
            _SUBJECT,
            f"turns the curriculum on, and its {unusable[0]} is {values.get(unusable[0])}; give a number, or turn it off",
        )
        return None
    kind = str(values.get("curriculum_type")), str(values.get("schedule_type"))
    return Curriculum(kind, *(int(values[name]) for name in names))
