"""Flags of a launch -> the settings of `trainer`: GPUs, precision, strategy, when to stop, validate and save."""

from __future__ import annotations

import math
import posixpath

from nlgmoe.tools.megatron.translation import Translation

# Loss scaling of the tutorial's ds_config_gpt_TEMPLATE.json, and of Megatron without DeepSpeed (megatron/arguments.py)
TEMPLATE_FP16 = {"initial_scale_power": 11, "loss_scale_window": 500, "hysteresis": 2}
MEGATRON_FP16 = {"initial_scale_power": 32, "loss_scale_window": 1000, "hysteresis": 2}


def trainer_settings(job: Translation) -> None:
    """Set `trainer`."""
    arguments = job.arguments
    folder = arguments.value("--save") or arguments.value("--tensorboard-dir") or "runs/megatron"
    job.set("trainer.default_root_dir", posixpath.normpath(folder))
    job.set("trainer.accelerator", "gpu")
    for setting, flags in {
        "devices": ("--num_gpus", "--nproc_per_node", "--nproc-per-node"),
        "num_nodes": ("--num_nodes", "--nnodes"),
    }.items():
        for flag in flags:
            if arguments.has(flag):
                job.set(f"trainer.{setting}", arguments.value(flag))
    if arguments.has("--fp16") and arguments.has("--bf16"):
        arguments.refuse("--bf16", "contradicts --fp16; remove one of them")
    precision = "16-mixed" if arguments.has("--fp16") else "bf16-mixed" if arguments.has("--bf16") else "32-true"
    job.set("trainer.precision", precision)
    _strategy(job, precision)
    if (steps := arguments.value("--train-iters")) is not None:
        job.set("trainer.max_steps", steps)
    if (minutes := arguments.value("--exit-duration-in-mins")) is not None:
        days, hours = divmod(minutes // 60, 24)
        job.set("trainer.max_time", f"{days:02}:{hours:02}:{minutes % 60:02}:00")
    if job.deepspeed is None:
        job.copy("Optimisation", "trainer.gradient_clip_val")
    else:
        job.set("trainer.gradient_clip_val", job.deepspeed.gradient_clipping)
    _evaluation(job)
    job.copy("Run and cluster", "trainer.log_every_n_steps")
    _checkpoints(job)


def _strategy(job: Translation, precision: str) -> None:
    arguments, path = job.arguments, "trainer.strategy.init_args."
    job.set("trainer.strategy.class_path", "nlgmoe.ExpertParallelStrategy")
    stage = arguments.value("--zero-stage")
    if job.deepspeed is not None:
        if stage not in (None, job.deepspeed.stage):
            arguments.refuse(
                "--zero-stage", f"is {job.deepspeed.stage} in the DeepSpeed configuration; make them agree"
            )
        stage = job.deepspeed.stage
    job.set(f"{path}stage", stage or 1)
    if job.is_moe and (degree := arguments.value("--moe-expert-parallel-size")) is not None:
        job.set(f"{path}expert_parallel_size", degree)
    offload = arguments.has("--cpu-optimizer") or (job.deepspeed is not None and job.deepspeed.offload)
    job.set(f"{path}offload_optimizer", offload)
    if precision == "16-mixed":
        for name, value in _loss_scale(job).items():
            job.set(path + name, value)
    if (minutes := arguments.value("--distributed-timeout-minutes")) is not None:
        job.set(f"{path}timeout_seconds", 60.0 * minutes)


def _loss_scale(job: Translation) -> dict[str, int]:
    arguments = job.arguments
    if job.deepspeed is not None:
        return job.deepspeed.fp16_scale
    scale = dict(TEMPLATE_FP16 if arguments.has("--deepspeed") else MEGATRON_FP16)
    if (initial := arguments.value("--initial-loss-scale")) is not None:
        if not math.log2(initial).is_integer():
            arguments.refuse("--initial-loss-scale", "is no power of 2, as loss scales are here; change it")
        scale["initial_scale_power"] = round(math.log2(initial))
    if (window := arguments.value("--loss-scale-window")) is not None:
        scale["loss_scale_window"] = int(window)
    if (hysteresis := arguments.value("--hysteresis")) is not None:
        scale["hysteresis"] = hysteresis
    return scale


def _evaluation(job: Translation) -> None:
    interval, batches = job.arguments.value("--eval-interval"), job.arguments.value("--eval-iters")
    if batches == 0:
        job.set("trainer.limit_val_batches", 0)
        return
    job.set("trainer.val_check_interval", interval)
    job.set("trainer.check_val_every_n_epoch", None)
    if job.global_batch is not None and batches is not None:
        # Each part of a blend is one domain.
        parts = len(job.tree["data"].get("corpus", {}).get("init_args", {}).get("parts", [""]))
        job.set("data.max_eval_windows", -(-batches * job.global_batch // parts))


def _checkpoints(job: Translation) -> None:
    arguments = job.arguments
    if arguments.has("--load"):
        if arguments.value("--load") == arguments.value("--save"):
            job.notes.append("--load: to go on after an interruption, add --ckpt_path last to the command.")
        else:
            arguments.refuse("--load", "starts from another run's checkpoint, which is not read here; remove it")
    if not arguments.has("--save"):
        job.set("trainer.enable_checkpointing", False)
        return
    if (every := arguments.required("--save-interval")) is not None:
        keeper = {"every_n_steps": None, "milestones": every, "save_before_validation": False}
        job.set("trainer.callbacks", [{"class_path": "nlgmoe.callbacks.SaveCheckpoints", "init_args": keeper}])
