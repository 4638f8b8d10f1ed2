"""Lightning's trainer settings that it accepts and then fails on, or ignores: refused before anything is made."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.plugins.environments import LSFEnvironment, SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_warn
from torch import distributed

from nlgmoe.cli.errors import did_you_mean
from nlgmoe.device import default_device, lacks_gpu
from nlgmoe.processes import check_processes, named_devices
from nlgmoe.resuming.keepers import metrics_in_name
from nlgmoe.run_checks import DEEPSPEED_REFUSED, FSDP_REFUSED, SETTINGS_REFUSED, callback_refused
from nlgmoe.validation import SettingError

_UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")


def check_trainer(trainer: Mapping[str, Any], subcommand: str | None) -> None:
    """Check the `trainer` section.

    Args:
        trainer: setting -> value, as parsed.
        subcommand: that it is for, such as fit.

    Raises:
        ValueError: a setting is out of its range, or does not go with another; the message says what to write.
    """
    folder = trainer["default_root_dir"]
    _require(folder is not None and bool(str(folder).strip()), "default_root_dir", folder, "names no folder; give one")
    _require("://" not in str(folder), "default_root_dir", folder, "must be a folder, which may be a mounted one")
    why = "has the name of a checkpoint, for which commands would take it; name a folder that does not end with .ckpt"
    _require(not str(folder).rstrip("/").endswith(".ckpt"), "default_root_dir", folder, why)
    why = "turns off what a run is for; set trainer.logger and trainer.enable_checkpointing to false"
    _require(not trainer["barebones"], "barebones", trainer["barebones"], why)
    _check_counts(trainer)
    _check_epochs(trainer)
    _check_fractions(trainer, subcommand)
    _check_validation(trainer)
    _check_strategy(trainer)


def check_machine(trainer: Mapping[str, Any]) -> None:
    """Check that this machine has what the `trainer` section asks for.

    Raises:
        ValueError: there is no GPU, or there are far fewer CPUs than `devices`.
    """
    accelerator = trainer["accelerator"]
    why = (
        "but PyTorch finds no GPU here; add --config configs/hardware/cpu.yaml to run without one, or check the driver with "
        "nvidia-smi"
    )
    _require(not lacks_gpu(accelerator), "accelerator", accelerator, why)
    on_cpu, devices = default_device() == "cpu" or accelerator == "cpu", trainer["devices"]
    if on_cpu:  # each is a process; of GPUs there are as many as there are
        why = "names GPUs; on a CPU give a number of processes, such as 1"
        _require(devices == "auto" or str(devices).isdigit(), "devices", devices, why)
        check_processes("trainer.devices", _number(devices))
    there = named_devices(devices)
    if there is None:
        there = 1 if on_cpu else torch.accelerator.device_count()
    _check_launcher(trainer, there)
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if (
        on_cpu
        and restarts != "0"
        and os.environ.get("WORLD_SIZE") != "1"
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):
        # The store has the addresses of the ranks before.
        raise SettingError(
            f"torchrun --max-restarts {restarts}: restarted ranks that use gloo may wait for those that have ended; start it "
            "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"
        )
    in_bf16 = on_cpu and "bf16" in str(trainer["precision"])
    if in_bf16 and platform.machine() == "x86_64" and not _has_bf16_products():
        rank_zero_warn(
            f"trainer.precision={trainer['precision']}: this processor has no instructions for products in bf16 "
            "(AVX512_BF16), so that they take longer than in fp32; set it to 32-true for speed"
        )


def _check_launcher(trainer: Mapping[str, Any], there: int) -> None:
    """Check that the variables of a launcher fit `trainer.devices`, here `there`, and `num_nodes`.

    Raises:
        ValueError: they do not.
    """
    devices, nodes = trainer["devices"], trainer["num_nodes"]
    # By torchrun or DeepSpeed's launcher; with other devices each would be a run of its own.
    started = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE" if "LOCAL_RANK" in os.environ else "")
    if started is not None:
        why = f"is not the number of processes that the launcher has started here, {started}; set it to that"
        _require(started == str(there), "devices", devices, why)
    if distributed.is_initialized():  # by an earlier run of this process
        size, remedy = distributed.get_world_size(), "start another program"
        if there * nodes == 1:
            remedy = "call torch.distributed.destroy_process_group() on all of them first, or " + remedy
        why = f"and num_nodes={nodes} do not make the {size} processes that an earlier run has connected; {remedy}"
        _require(there * nodes == size, "devices", devices, why)
    if str(trainer["strategy"]) != "auto":  # without a launcher, which compares them itself
        local, node = int(os.environ.get("LOCAL_RANK") or 0), int(os.environ.get("NODE_RANK") or 0)
        why = "is too low for the environment's {}={}, which counts from 0; raise it, or unset that variable"
        _require(local < there, "devices", devices, why.format("LOCAL_RANK", local))
        _require(node < nodes, "num_nodes", nodes, why.format("NODE_RANK", node))
    if SLURMEnvironment.detect() and not {"SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID"} <= os.environ.keys():
        raise SettingError(
            "this is a Slurm job, and not a process that srun has started; start it by srun, or unset SLURM_NTASKS"
        )
    # Lightning takes the first for the rank of the process.
    ranks, world_size = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"), os.environ.get("WORLD_SIZE")
    name = next((one for one in ranks if os.environ.get(one)), None)
    # Lightning's launcher leaves these, after an earlier run of this process.
    left = not world_size and {"LOCAL_RANK", "MASTER_PORT"} <= os.environ.keys()
    if name is None or (left and name in ("RANK", "LOCAL_RANK")):
        return
    if there * nodes == 1:  # a run of its own, of which Lightning logs nothing unless it is of rank 0
        expected = {name: "0"} | ({"WORLD_SIZE": "1"} if world_size and name in ("RANK", "LOCAL_RANK") else {})
        for one, value in expected.items():
            why = f"and num_nodes=1 make one process, and the environment has {one}={os.environ[one]}; raise them, or unset it"
            _require(os.environ[one] == value, "devices", devices, why)
    elif "LOCAL_RANK" in os.environ and not (world_size or SLURMEnvironment.detect() or LSFEnvironment.detect()):
        raise SettingError(
            f"the environment has LOCAL_RANK={os.environ['LOCAL_RANK']}, as of a launcher, and no WORLD_SIZE: ranks would wait "
            "for others that nothing starts; unset it, or set WORLD_SIZE"
        )


def _has_bf16_products() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())  # AMX comes with it


def _check_counts(trainer: Mapping[str, Any]) -> None:
    at_least = {
        "accumulate_grad_batches": (1, "1 takes an optimizer step after every micro-batch"),
        "max_steps": (-1, "-1 leaves the end to model.train_tokens or max_time"),
        "log_every_n_steps": (1, "to log nothing, set trainer.logger to false"),
        "num_nodes": (1, "it counts machines"),
        "num_sanity_val_steps": (-1, "0 turns them off"),
        "gradient_clip_val": (0, "0 or null turns clipping off, 1.0 is the paper's"),
    }
    for name, (lowest, remedy) in at_least.items():
        value = trainer[name]
        _require(value is None or value >= lowest, name, value, f"must be at least {lowest}; {remedy}")
    for name, why in SETTINGS_REFUSED.items():
        allowed = (0, None) if name == "overfit_batches" else (None,)  # Lightning makes min_steps=0 a min_epochs of 1
        _require(trainer[name] in allowed, name, trainer[name], why)
    for unit, count in dict(trainer["max_time"]).items() if isinstance(trainer["max_time"], Mapping) else ():
        if unit not in _UNITS:
            raise ValueError(f"{unit}={count} is no unit of trainer.max_time{did_you_mean(unit, _UNITS)}")
    above = f"is above the largest duration, {timedelta.max.days} days; leave it out"
    if isinstance(trainer["max_time"], Mapping):
        why = "trains nothing; raise it, or leave it out"
        try:
            ends = timedelta(**trainer["max_time"]) >= timedelta(0)
        except OverflowError:
            ends, why = False, above
        _require(ends, "max_time", dict(trainer["max_time"]), why)
    elif trainer["max_time"] is not None:
        numbers = map(int, re.findall("[0-9]+", str(trainer["max_time"])))
        _require(all(number <= timedelta.max.days for number in numbers), "max_time", trainer["max_time"], above)
    for name in ("max_steps", "max_time"):
        nothing = trainer[name] is not None and not re.search("[1-9]", str(trainer[name]))
        _require(not nothing, name, trainer[name], "trains nothing; raise it, or leave it out")
    devices = trainer["devices"]
    number = _number(devices)
    wrong = number == 0 or number < -1
    _require(not wrong, "devices", devices, "must be a number of devices above 0, or auto")
    algorithm = trainer["gradient_clip_algorithm"]
    _require(algorithm in (None, "norm", "value"), "gradient_clip_algorithm", algorithm, "must be norm or value")


def _check_epochs(trainer: Mapping[str, Any]) -> None:
    """Training data have no end: what counts epochs never happens."""
    why = "counts passes over training data, which have no end"
    without_effect: dict[str, tuple[tuple[Any, ...], str]] = {
        "max_epochs": ((None, -1), f"{why}: the end is model.train_tokens, trainer.max_steps or trainer.max_time"),
        "check_val_every_n_epoch": ((None, 1), f"{why}; set trainer.val_check_interval, in steps"),
        "reload_dataloaders_every_n_epochs": ((0,), f"{why}; leave it out"),
    }
    for name, (values, remedy) in without_effect.items():
        _require(trainer[name] in values, name, trainer[name], remedy)
    limit = trainer["limit_train_batches"]
    whole = limit is None or (isinstance(limit, float) and limit == 1.0)
    _require(whole, "limit_train_batches", limit, "cuts up training data that have no end; set trainer.max_steps")


def check_callbacks(callbacks: Iterable[Callback], limit_val_batches: int | float | None) -> None:
    """Check that the callbacks of a configuration can do what they are for.

    Raises:
        ValueError: one counts epochs, which never end here, or changes weights that checkpoints do not hold.
    """
    states: set[str] = set()
    for one in callbacks:
        why = callback_refused(one)
        if isinstance(one, EarlyStopping) and limit_val_batches == 0:
            why = "looks after validations, which trainer.limit_val_batches=0 turns off; remove one of the two"
        elif isinstance(one, EarlyStopping) and one._check_on_train_epoch_end:
            why = "has check_on_train_epoch_end=true, and the epoch is the whole run; leave it out"
        elif isinstance(one, ModelCheckpoint) and one.monitor and one._every_n_epochs and one._save_on_train_epoch_end:
            why = (
                "has a monitor and save_on_train_epoch_end=true, and the epoch is the whole run; leave one of them out"
            )
        elif isinstance(one, ModelCheckpoint) and one._every_n_epochs and limit_val_batches == 0:
            why = "saves after validations, which trainer.limit_val_batches=0 turns off; set every_n_train_steps"
        elif isinstance(one, ModelCheckpoint) and one._every_n_epochs > 1:
            why = f"has every_n_epochs={one._every_n_epochs}, which never comes; set every_n_train_steps"
        elif (
            isinstance(one, ModelCheckpoint)
            and one.auto_insert_metric_name
            and any("/" in name for name in metrics_in_name(one))
        ):
            why = (
                f"has filename={one.filename}, whose metric's name makes folders; set auto_insert_metric_name to false"
            )
        elif isinstance(one, ModelCheckpoint) and (problem := _problem_of_name(one)):
            why = f"has filename={one.filename}, which cannot be filled in ({problem}); write it as {{step}}-{{val/loss:.2f}}"
        elif isinstance(one, ModelCheckpoint) and one._train_time_interval == timedelta(0):
            why = "has a train_time_interval of 0, which saves after every step; raise it, or set every_n_train_steps"
        elif isinstance(one, Timer) and one._duration is not None and one._duration <= 0:
            why = "has a duration that trains nothing; raise it"
        elif isinstance(one, Timer) and one._interval == "epoch":
            why = "has interval=epoch, which never ends here; set it to step"
        elif type(one).state_dict is not Callback.state_dict and one.state_key in states:
            why = "is there twice with the same monitor and intervals, so that a checkpoint cannot tell them apart; remove one"
        if why is not None:
            raise ValueError(f"trainer.callbacks: {type(one).__name__} {why}")
        states.add(one.state_key)


def _problem_of_name(keeper: ModelCheckpoint) -> str | None:
    """Return why a `filename` cannot be filled in when a checkpoint is saved; None if it can."""
    metrics = {name: torch.tensor(0.5) for name in metrics_in_name(keeper)}
    try:
        keeper.format_checkpoint_name(metrics | {"epoch": torch.tensor(0), "step": torch.tensor(0)})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _check_fractions(trainer: Mapping[str, Any], subcommand: str | None) -> None:
    for name in ("limit_val_batches", "limit_test_batches", "limit_predict_batches"):
        value = trainer[name]
        if value is None:
            continue
        highest = 1 if isinstance(value, float) else float("inf")
        why = "must be a fraction from 0.0 to 1.0, or a whole number of batches"
        _require(0 <= value <= highest, name, value, why)
        nothing = value == 0 and name == f"limit_{subcommand}_batches"
        _require(not nothing, name, value, f"leaves nothing to {subcommand}; leave it out")


def _check_validation(trainer: Mapping[str, Any]) -> None:
    interval = trainer["val_check_interval"]
    fraction = isinstance(interval, float) and interval != 1.0
    why = "is a fraction of training data that have no end; give a whole number of steps, such as 500"
    _require(not fraction, "val_check_interval", interval, why)
    by_clock = not (interval is None or isinstance(interval, int | float))
    why = "goes by the clock of each rank, and ranks would wait for each other; give a number of steps, such as 500"
    _require(not by_clock, "val_check_interval", interval, why)
    too_low = isinstance(interval, int) and interval < 1
    _require(not too_low, "val_check_interval", interval, "must be at least 1 step")
    callbacks = trainer["callbacks"] or []
    saves = [
        one
        for one in (callbacks if isinstance(callbacks, list) else [callbacks])
        if _class_name(one) == "ModelCheckpoint"
    ]
    why = "does not go with the ModelCheckpoint in trainer.callbacks; remove one of the two"
    contradiction = trainer["enable_checkpointing"] is False and bool(saves)
    _require(not contradiction, "enable_checkpointing", trainer["enable_checkpointing"], why)


def _check_strategy(trainer: Mapping[str, Any]) -> None:
    strategy = trainer["strategy"]
    shown = strategy if isinstance(strategy, str) else _class_name(strategy)
    _require(
        not shown.startswith("{"), "strategy", shown, "is not understood; give it in a file, where each line is checked"
    )
    fsdp = shown.startswith("fsdp") or shown.endswith(("FSDPStrategy", "ModelParallelStrategy"))
    _require(not fsdp, "strategy", shown, FSDP_REFUSED)
    started = strategy.get("init_args", {}).get("start_method") if hasattr(strategy, "get") else None
    copied = shown.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")) or started not in (None, "popen")
    _require(not copied, "strategy", shown, "makes ranks out of this process; use ddp, whose ranks start by themselves")
    plain = shown.startswith("deepspeed") or shown.endswith("DeepSpeedStrategy")
    _require(not plain, "strategy", shown, DEEPSPEED_REFUSED)
    by_value = trainer["gradient_clip_algorithm"] == "value" and shown.endswith("ExpertParallelStrategy")
    _require(
        not by_value, "gradient_clip_algorithm", "value", "is nothing that DeepSpeed does; leave it out, or use ddp"
    )


def _number(devices: Any) -> int:
    """Of `trainer.devices`, which comes as text from a flag; 1 where it is no number."""
    return int(devices) if str(devices).removeprefix("-").isdigit() else 1


def _class_name(value: Any) -> str:
    path = value.get("class_path", "") if hasattr(value, "get") else type(value).__name__
    return str(path).rpartition(".")[2]


def _require(condition: bool, name: str, value: Any, why: str) -> None:
    if not condition:
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        raise ValueError(f"trainer.{name}={shown} {why}")
