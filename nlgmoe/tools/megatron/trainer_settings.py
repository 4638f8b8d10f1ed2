"""Flags of a launch and the file of `--deepspeed_config` -> the settings of `trainer`.

These are GPUs, precision, strategy, when to stop, validate and save. Of DeepSpeed's configuration ZeRO, precision with its loss
scale, and clipping are read.
"""

from __future__ import annotations

import json
import posixpath
from pathlib import Path
from typing import Any, NamedTuple

from nlgmoe.tools.megatron.flags import Arguments, Translation

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
_READ = {"zero_optimization", "fp16", "bf16", "curriculum_learning", "gradient_clipping", *_BATCH}
# DeepSpeed's own defaults (deepspeed/runtime/constants.py) for what the block fp16 leaves out
_SCALE = {"initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}


class DeepSpeedConfig(NamedTuple):
    """What is read of DeepSpeed's configuration."""

    stage: int
    offload: bool
    gradient_clipping: float
    fp16_scale: dict[str, int]  # initial_scale_power, loss_scale_window, hysteresis


def read_deepspeed_config(job: Translation) -> DeepSpeedConfig | None:
    """Read the file of `--deepspeed_config`, relative to the current folder; None where it is not there."""
    arguments, notes = job.arguments, job.notes
    name = arguments.value("--deepspeed_config")
    if name is None:
        return None
    if not Path(name).is_file() or not Path(name).stat().st_size:
        missing = "its clipping and offload, if any, are missing"
        notes.append(f"--deepspeed_config {name} is not there, or empty: {missing}.")
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

    for name in sorted(config.keys() - _WITHOUT_EFFECT - _READ):
        value = config[name]
        if value and (not isinstance(value, dict) or value.get("enabled", True)):
            refuse(f"has {name}, which is not available here; remove it")
    for name, flag in _BATCH.items():
        given = arguments.value(flag)
        if config.get(name) not in (None, "auto", given):
            refuse(f"has {name}={config[name]}, {flag} is {given}; make them agree")
    zero, fp16, bf16 = (config.get(name) or {} for name in ("zero_optimization", "fp16", "bf16"))
    if (config.get("curriculum_learning") or {}).get("enabled"):
        refuse(
            "has curriculum_learning, whose sequences grow by steps there and by tokens here; turn it off, and set "
            "model.curriculum (docs/scaling.md)"
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


# ---- settings

# Loss scaling of the tutorial's ds_config_gpt_TEMPLATE.json, for a launch whose file is not there
TEMPLATE_FP16 = {"initial_scale_power": 11, "loss_scale_window": 500, "hysteresis": 2}


def trainer_settings(job: Translation, deepspeed: DeepSpeedConfig | None) -> None:
    """Set `trainer`; without DeepSpeed's configuration Megatron's own defaults count."""
    arguments = job.arguments
    job.set("trainer.accelerator", "gpu")
    job.copy("Run and cluster", "trainer.")
    if arguments.has("--fp16") and arguments.has("--bf16"):
        arguments.refuse("--bf16", "contradicts --fp16; remove one of them")
    precision = "16-mixed" if arguments.has("--fp16") else "bf16-mixed" if arguments.has("--bf16") else "32-true"
    job.set("trainer.precision", precision)
    _strategy(job, precision, deepspeed)
    job.copy("Length", "trainer.")
    if (minutes := arguments.value("--exit-duration-in-mins")) is not None:
        days, hours = divmod(minutes // 60, 24)
        job.set("trainer.max_time", f"{days:02}:{hours:02}:{minutes % 60:02}:00")
    if deepspeed is None:
        job.copy("Optimisation", "trainer.gradient_clip_val")
    else:
        job.set("trainer.gradient_clip_val", deepspeed.gradient_clipping)
    _evaluation(job)
    _checkpoints(job)


def _strategy(job: Translation, precision: str, deepspeed: DeepSpeedConfig | None) -> None:
    arguments, path = job.arguments, "trainer.strategy.init_args."
    job.set("trainer.strategy.class_path", "nlgmoe.ExpertParallelStrategy")
    stage = arguments.value("--zero-stage")
    if deepspeed is not None:
        if stage not in (None, deepspeed.stage):
            arguments.refuse("--zero-stage", f"is {deepspeed.stage} in the DeepSpeed configuration; make them agree")
        stage = deepspeed.stage
    job.set(f"{path}stage", stage or 1)
    if job.is_moe:
        job.copy("Experts", path)
    job.set(f"{path}offload_optimizer", deepspeed is not None and deepspeed.offload)
    if precision == "16-mixed":
        for name, value in (TEMPLATE_FP16 if deepspeed is None else deepspeed.fp16_scale).items():
            job.set(path + name, value)


def _evaluation(job: Translation) -> None:
    batches = job.arguments.value("--eval-iters")
    job.set("trainer.check_val_every_n_epoch", None)
    if job.global_batch is not None and batches is not None:
        # Each part of a blend is one domain.
        parts = len(job.tree["data"].get("corpus", {}).get("init_args", {}).get("parts", [""]))
        job.set("data.max_eval_windows", -(-batches * job.global_batch // parts))


def _checkpoints(job: Translation) -> None:
    arguments = job.arguments
    if (folder := arguments.required("--save")) is not None:
        job.set("trainer.default_root_dir", posixpath.normpath(folder))
    if arguments.value("--load") not in (None, folder):
        arguments.refuse("--load", "starts from another run's checkpoint, which is not read here; remove it")
    elif arguments.has("--load"):
        job.notes.append("--load: to go on after an interruption, add --ckpt_path last to the command.")
    if (every := arguments.required("--save-interval")) is not None:
        keeper = {"every_n_steps": None, "milestones": every, "save_before_validation": False}
        job.set("trainer.callbacks", [{"class_path": "nlgmoe.callbacks.SaveCheckpoints", "init_args": keeper}])
