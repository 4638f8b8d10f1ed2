"""Settings of the trainer: nodes and GPUs, precision, strategy, when to stop, validate and save."""

from __future__ import annotations

import math
import posixpath

from nlgmoe.tools.megatron.deepspeed_config import MEGATRON_FP16, SUBJECT, TEMPLATE_FP16
from nlgmoe.tools.megatron.job import DEFAULT, Job


def run_settings(job: Job) -> None:
    """Set `trainer.*`."""
    _run_folder(job)
    if job.cluster is not None:
        job.set("trainer.accelerator", "gpu")
        job.set("trainer.devices", job.cluster.devices, job.cluster.comment)
        job.set("trainer.num_nodes", job.cluster.nodes)
    precision = _precision(job)
    job.set("trainer.precision", precision)
    _strategy(job, precision)
    if (steps := job.arguments.value("--train-iters")) is not None:
        beside = "or train_tokens: whichever comes first" if job.arguments.has("--train-tokens") else ""
        job.set("trainer.max_steps", steps, beside)
    minutes = job.arguments.value("--exit-duration-in-mins")
    if minutes is not None:
        hours, days = minutes // 60 % 24, minutes // 60 // 24
        text = f"{days:02}:{hours:02}:{minutes % 60:02}:00"
        job.set("trainer.max_time", text, "days:hours:minutes:seconds, over all restarts")
    clipping = job.deepspeed.gradient_clipping
    if clipping is None:
        job.set_from_flags("Optimisation", "trainer.gradient_clip_val")
    else:
        job.set("trainer.gradient_clip_val", clipping, job.deepspeed.source)
    _evaluation(job)
    job.set_from_flags("Run and cluster", "trainer.log_every_n_steps")
    _checkpoints(job)


def _run_folder(job: Job) -> None:
    for name in ("--save", "--tensorboard-dir"):
        if job.arguments.has(name):
            job.set("trainer.default_root_dir", posixpath.normpath(job.arguments.value(name)), f"of {name}")
            return
    job.set("trainer.default_root_dir", f"runs/{job.launch.name}", "no --save")


def _precision(job: Job) -> str:
    """Lightning's name; the flag and DeepSpeed's configuration must agree."""
    fp16, bf16 = job.arguments.has("--fp16"), job.arguments.has("--bf16")
    if fp16 and bf16:
        job.arguments.refuse("--bf16", "contradicts --fp16; remove one of them")
    for flag, given, configured in (("fp16", fp16, job.deepspeed.fp16), ("bf16", bf16, job.deepspeed.bf16)):
        if configured is not None and configured != given:
            there, here = ("on", "off") if configured else ("off", "on")
            job.arguments.problem(
                SUBJECT,
                f"has {flag} {there}, --{flag} is {here}; make them agree",
            )
    return "16-mixed" if fp16 else "bf16-mixed" if bf16 else "32-true"


def _strategy(job: Job, precision: str) -> None:
    path = "trainer.strategy."
    job.set(f"{path}class_path", "nlgmoe.ExpertParallelStrategy")
    path += "init_args."
    stage, comment = _stage(job)
    offload = job.deepspeed.offload or job.arguments.has("--cpu-optimizer")
    if stage == 0:
        comment = f"0 there ({comment or 'by --zero-stage'}); 1 computes the same, with the optimizer's states sharded"
        stage = 1
    if stage is not None:
        job.set(f"{path}stage", stage, comment)
    degree = job.arguments.value("--moe-expert-parallel-size")
    if job.is_moe and degree is not None:
        if job.cluster is not None and degree > job.cluster.world_size:
            job.arguments.refuse("--moe-expert-parallel-size", f"is above the {job.cluster.world_size} GPUs; lower it")
        job.set(
            f"{path}expert_parallel_size",
            degree,
            job.default("--moe-expert-parallel-size") or "at most; a layer takes the largest that divides its experts",
        )
    job.set(f"{path}offload_optimizer", offload)
    if precision == "16-mixed":
        _loss_scale(job, path)
    minutes = job.arguments.value("--distributed-timeout-minutes")
    if minutes is not None:
        job.set(f"{path}timeout_seconds", 60.0 * minutes, f"{minutes} minutes")


def _stage(job: Job) -> tuple[int | None, str]:
    """ZeRO's stage, and a comment on its origin."""
    flag = job.arguments.value("--zero-stage")
    seen = job.deepspeed.stage
    variable = job.launch.variables.get("ZERO_STAGE", "")
    if flag is not None and seen is not None and flag != seen:
        job.arguments.refuse("--zero-stage", f"is {seen} in the DeepSpeed configuration; make them agree")
    if seen is not None:
        if seen not in (0, 1, 2):
            job.arguments.problem(f"ZeRO stage {seen}", "is not possible with experts; use 0, 1 or 2")
        return seen, job.deepspeed.source
    if flag is not None or job.arguments.has("--zero-stage"):
        return flag, ""
    if variable in ("0", "1", "2"):
        return int(variable), "of the variable ZERO_STAGE"
    unseen = "an assumption: DeepSpeed's configuration is not known"
    return 0, unseen if job.arguments.has("--deepspeed") else "no --deepspeed"


def _loss_scale(job: Job, path: str) -> None:
    config = job.deepspeed
    if config.fp16_scale is not None:
        scale, comment = dict(config.fp16_scale), config.source
    elif job.arguments.has("--deepspeed"):
        scale, comment = dict(TEMPLATE_FP16), "of the tutorial's DeepSpeed template"
    else:
        scale, comment = dict(MEGATRON_FP16), DEFAULT
    comments = dict.fromkeys(scale, comment)
    if config.fp16_scale is None:
        initial = job.arguments.value("--initial-loss-scale")
        if initial is not None and not math.log2(initial).is_integer():
            job.arguments.refuse("--initial-loss-scale", "is no power of 2, as loss scales are here; change it")
        given = {
            "initial_scale_power": None if initial is None else round(math.log2(initial)),
            "loss_scale_window": job.arguments.value("--loss-scale-window"),
            "hysteresis": job.arguments.value("--hysteresis") if job.arguments.has("--hysteresis") else None,
        }
        for name, value in given.items():
            if value is not None:
                scale[name], comments[name] = int(value), ""
    for name, value in scale.items():
        job.set(path + name, value, comments[name])


def _evaluation(job: Job) -> None:
    interval, iterations = job.arguments.value("--eval-interval"), job.arguments.value("--eval-iters")
    if interval is None or iterations is None:
        return
    if iterations == 0:
        job.set("trainer.limit_val_batches", 0, "--eval-iters 0")
        return
    job.set("trainer.val_check_interval", interval, "steps")
    job.set("trainer.check_val_every_n_epoch", None, "training has no epochs")
    if job.global_batch is not None:
        parts = len(job.result.settings.get("data.corpus.init_args.parts", [""]))  # of a blend; each is one domain
        comment = f"sequences: {iterations} batches of {job.global_batch}" + (
            f" over {parts} parts" if parts > 1 else ""
        )
        job.set("data.max_eval_windows", -(-iterations * job.global_batch // parts), comment)


def _checkpoints(job: Job) -> None:
    _check_load(job)
    if not job.arguments.has("--save"):
        job.set("trainer.enable_checkpointing", False, "no --save")
        return
    every = job.arguments.required("--save-interval")
    if every is None:
        return
    keeper = {"every_n_steps": None, "milestones": every, "save_before_validation": False}
    job.set(
        "trainer.callbacks",
        [{"class_path": "nlgmoe.callbacks.SaveCheckpoints", "init_args": keeper}],
        "Megatron keeps all checkpoints",
    )


def _check_load(job: Job) -> None:
    if not job.arguments.has("--load"):
        return
    if job.arguments.value("--load") == job.arguments.value("--save"):
        job.result.notes.append("--load: to go on after an interruption, add --ckpt_path last to the command.")
    else:
        job.arguments.refuse("--load", "starts from another run's checkpoint, which is not read here; remove it")
