"""What a launch says about its machines and its DeepSpeed configuration, outside Megatron's own flags."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from nlgmoe.tools.megatron.arguments import Arguments
from nlgmoe.tools.megatron.launch import Given, Launch, explain

# The tutorial's ds_config_gpt_TEMPLATE.json, for scripts that fill a template which is not seen here.
TEMPLATE_FP16 = {"initial_scale_power": 11, "loss_scale_window": 500, "hysteresis": 2}
# Megatron's own loss scaler, without DeepSpeed (megatron/arguments.py).
MEGATRON_FP16 = {"initial_scale_power": 32, "loss_scale_window": 1000, "hysteresis": 2}

_DEVICE_FLAGS = {"--num_gpus", "--nproc_per_node", "--nproc-per-node"}
_NODE_FLAGS = {"--num_nodes", "--nnodes"}


@dataclass(frozen=True)
class Machines:
    """Devices on each node, nodes, and how that is known."""

    devices: int
    nodes: int
    comment: str = ""

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.devices * self.nodes


def machines(launch: Launch, arguments: Arguments) -> Machines | None:
    """The launcher's counts, or those of the variables that the tutorial's scripts keep them in; None with a problem."""
    given: dict[str, int] = {}
    words = [part for word in launch.launcher for part in [word._replace(text=t) for t in word.text.split("=", 1)]]
    for word, value in zip(words, [*words[1:], None], strict=True):
        if word.text in _DEVICE_FLAGS | _NODE_FLAGS and value is not None:
            number = _count(value.text, value.line, f"{word.text} {value.text}", arguments)
            if number is None:
                return None
            given["devices" if word.text in _DEVICE_FLAGS else "nodes"] = number
    starter = launch.launcher[0].text.rpartition("/")[2]
    texts = {word.text for word in launch.launcher}
    counts_itself = starter == "torchrun" or {"torch.distributed.launch", "torch.distributed.run"} & texts
    if "devices" in given or counts_itself:  # torchrun starts one process if it is not told how many
        return Machines(given.get("devices", 1), given.get("nodes", 1))
    if starter in ("python", "python3"):
        return Machines(1, 1, "started by python alone: one process")
    if launch.variables.get("NUM_GPUS") is None:
        arguments.problem(
            launch.line, starter, "does not say how many GPUs: they are in a host file; add --num_gpus and --num_nodes"
        )
        return None
    total = _count(str(launch.variables["NUM_GPUS"]), launch.line, "NUM_GPUS", arguments)
    if total is None:
        return None
    on_one = str(launch.variables.get("NUM_GPUS_PERNODE"))
    per_node = int(on_one) if on_one.isdigit() else None
    devices = per_node or (total // given["nodes"] if "nodes" in given else min(total, 8))
    if devices < 1 or total % devices:
        arguments.problem(launch.line, f"NUM_GPUS={total}", f"is no multiple of {devices} GPUs a node; correct it")
        return None
    return Machines(devices, total // devices, "" if per_node else f"NUM_GPUS={total}; 8 to a node is an assumption")


def _count(text: str, line: int, subject: str, arguments: Arguments) -> int | None:
    if unknown := arguments.expander.first_unknown(text):
        arguments.problem(line, arguments.expander.readable(subject), f"depends on {explain(unknown)}")
    elif text.isdigit() and int(text) > 0:
        return int(text)
    else:
        arguments.problem(line, subject, "is not a count; correct it")
    return None


@dataclass(frozen=True)
class Curriculum:
    """A section `curriculum_learning` that is enabled, as it stands there.

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
    """What the script is seen to put into DeepSpeed's configuration; None where it is not seen.

    Attributes:
        fp16_scale: `initial_scale_power`, `loss_scale_window`, `hysteresis`.
        source: where that was seen, for comments.
    """

    stage: int | None = None
    fp16: bool | None = None
    bf16: bool | None = None
    curriculum: Curriculum | None = None
    offload: bool = False
    gradient_clipping: float | None = None
    fp16_scale: dict[str, int] | None = None
    line: int = 1
    source: str = ""


def read_deepspeed_config(launch: Launch, arguments: Arguments) -> DeepSpeedConfig:
    """Read the configuration that a here-document writes, or that `sed` makes of a template."""
    use = arguments.uses.get("--deepspeed_config")
    document = launch.documents.get(use.values[0].text) if use else None
    if document is not None:
        return _from_document(document, arguments)
    fills = {key: given for key, given in launch.substitutions.items() if key in _TEMPLATE_KEYS}
    values = {key: _filled(key, given, arguments) for key, given in fills.items()}
    if not fills:
        return DeepSpeedConfig()
    stage = values.get("ZERO_STAGE")
    return DeepSpeedConfig(
        stage=int(stage) if stage is not None and stage.isdigit() else None,
        fp16=_truth(values.get("CONFIG_FP16_ENABLED")),
        bf16=_truth(values.get("CONFIG_BF16_ENABLED")),
        curriculum=_template_curriculum(launch, arguments) if _truth(values.get("CONFIG_CL_ENABLED")) else None,
        line=min(given.line for given in fills.values()),
        source="as sed fills the DeepSpeed configuration",
    )


_TEMPLATE_KEYS = {"ZERO_STAGE", "CONFIG_FP16_ENABLED", "CONFIG_BF16_ENABLED", "CONFIG_CL_ENABLED"}


# What the template says of the curriculum beside what is filled in.
_TEMPLATE_CURRICULUM = {"curriculum_type": "seqlen", "schedule_type": "fixed_linear", "difficulty_step": 8}


def _template_curriculum(launch: Launch, arguments: Arguments) -> Curriculum | None:
    """The curriculum of the tutorial's template."""
    section: dict[str, Any] = dict(_TEMPLATE_CURRICULUM)
    for key, name in (
        ("CONFIG_CL_MIN", "min_difficulty"),
        ("CONFIG_CL_MAX", "max_difficulty"),
        ("CONFIG_CL_DURATION", "total_curriculum_step"),
    ):
        given = launch.substitutions.get(key)
        section[name] = None if given is None else _filled(key, given, arguments)
    return _curriculum(section, launch.substitutions["CONFIG_CL_ENABLED"].line, arguments)


def _curriculum(section: dict[str, Any], line: int, arguments: Arguments) -> Curriculum | None:
    """The values of an enabled section; None with a problem."""
    values = section | section.get("schedule_config", {})
    names = ("min_difficulty", "max_difficulty", "total_curriculum_step", "difficulty_step")
    unusable = [name for name in names if not str(values.get(name)).isdigit()]
    if unusable:
        arguments.problem(
            line,
            "the DeepSpeed configuration",
            f"turns the curriculum on, and its {unusable[0]} is {values.get(unusable[0])}; give a number, or turn it off",
        )
        return None
    kind = str(values.get("curriculum_type")), str(values.get("schedule_type"))
    return Curriculum(kind, *(int(values[name]) for name in names))


def _filled(key: str, given: Given, arguments: Arguments) -> str | None:
    if unknown := arguments.expander.first_unknown(given.value):
        arguments.problem(given.line, key, f"depends on {explain(unknown)}")
        return None
    return given.value


def _truth(text: str | None) -> bool | None:
    return None if text is None else text.lower() == "true"


def _from_document(document: Given, arguments: Arguments) -> DeepSpeedConfig:
    if unknown := arguments.expander.first_unknown(document.value):
        arguments.problem(document.line, "the DeepSpeed configuration", f"depends on {explain(unknown)}")
        return DeepSpeedConfig()
    try:
        config: dict[str, Any] = json.loads(document.value)
    except json.JSONDecodeError as error:
        arguments.problem(document.line, "the DeepSpeed configuration", f"is no JSON ({error}); correct it")
        return DeepSpeedConfig()
    zero, fp16 = config.get("zero_optimization", {}), config.get("fp16", {})
    curriculum = config.get("curriculum_learning", {})
    return DeepSpeedConfig(
        stage=zero.get("stage", 0),
        fp16=fp16.get("enabled", False),
        bf16=config.get("bf16", config.get("bfloat16", {})).get("enabled", False),
        curriculum=_curriculum(curriculum, document.line, arguments) if curriculum.get("enabled") else None,
        offload=zero.get("offload_optimizer", {}).get("device", "none") != "none" or zero.get("cpu_offload", False),
        gradient_clipping=config.get("gradient_clipping", 0.0),
        # DeepSpeed's own defaults (deepspeed/runtime/constants.py) for what the block leaves out
        fp16_scale={
            "initial_scale_power": fp16.get("initial_scale_power", 16),
            "loss_scale_window": fp16.get("loss_scale_window", 1000),
            "hysteresis": fp16.get("hysteresis", 2),
        },
        line=document.line,
        source="the script's DeepSpeed configuration",
    )
