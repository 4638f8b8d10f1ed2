"""Checks of a run before its first step: trainer, memory, tokenizer, and ends that come too early."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from nlgmoe.batch import HasLargestBatch, HasTokenByteLengths
from nlgmoe.checkpoint.portable import PortableCheckpointIO
from nlgmoe.config import GPTConfig
from nlgmoe.device import missing_compiler, total_memory
from nlgmoe.layers.placement import PlacesExperts
from nlgmoe.model.least_memory import check_fits
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from nlgmoe.validation import SettingError

FSDP_REFUSED = (
    "divides the weights, which gradient norms, named optimizer groups and checkpoints here do not support; use "
    "nlgmoe.ExpertParallelStrategy, whose stage 2 divides optimizer states and gradients, or ddp"
)
DEEPSPEED_REFUSED = (
    "is Lightning's plain DeepSpeed, which knows no experts, and whose gradients and checkpoints nothing here reads; write "
    "trainer.strategy: {class_path: nlgmoe.ExpertParallelStrategy, init_args: {stage: 2}}"
)
_MINIMUM = "keeps a run going that is at its end or is told to stop; leave it out"
STOP_ITERATION = (
    "after step {} a callback or the data raised StopIteration, which Lightning takes for the end of the data; "
    "next(iterator, None) raises none"
)
SETTINGS_REFUSED = {  # of a Trainer, unless they are 0 or null
    "min_steps": _MINIMUM,
    "min_epochs": _MINIMUM,
    "overfit_batches": (
        "must stay 0: which sequences come follows from data.seed and the samples trained on; give a small data.data_dir"
    ),
}
_CALLBACKS_REFUSED = {
    GradientAccumulationScheduler: "counts epochs, and changes data.global_batch_size's batch; use data.batch_ramp_up",
    StochasticWeightAveraging: "counts epochs, which never end here; remove it",
    WeightAveraging: "replaces the weights at the end, so that a run would not go on as it was; remove it",
    LearningRateFinder: "sets the learning rate of one optimizer group, not model.schedule's; try values of model.optimizer.lr",
    BatchSizeFinder: "tries batches that data.global_batch_size does not know; remove it and set data.micro_batch_size",
    BaseFinetuning: "freezes a module before it has layers, and adds optimizer groups, which no checkpoint here holds; remove it",
    OnExceptionCheckpoint: (
        "makes every later run with it resume what it has saved; remove it, and set save_on_exception of ModelCheckpoint"
    ),
    SpikeDetection: "fails where a run with it is resumed; remove it: model.non_finite handles steps that are not finite",
    ModelPruning: "renames the parameters, which no checkpoint would then hold; remove it",
}


def callback_refused(callback: Callback, ranks: int = 1, shares_experts: bool = False) -> str | None:
    """Return why no run of so many ranks, which may share experts, can have `callback`; None if it can."""
    if shares_experts and isinstance(callback, LearningRateMonitor):
        return (
            "takes no optimizer whose groups of shared experts have one name; remove it: train/lr is the learning rate"
        )
    if ranks > 1 and isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
        return (
            f"saves where one of {ranks} ranks fails, which would wait for the others; set save_on_exception to false"
        )
    for kind, reason in _CALLBACKS_REFUSED.items():
        if isinstance(callback, kind):
            return reason
    if (
        isinstance(callback, ModelCheckpoint)
        and not callback._enable_version_counter
        and callback.save_top_k not in (0, 1)
        and "{" not in (callback.filename or "{step}")
    ):
        return (
            f"has filename={callback.filename} for all of save_top_k={callback.save_top_k} checkpoints, of which only the last "
            "one would be left; add {step} to it"
        )
    if isinstance(callback, ModelCheckpoint) and callback.filename:
        file = Path(re.sub(r"{[^}]*}", "", callback.filename))
        if file.is_absolute() or ".." in file.parts:
            return f"has filename={callback.filename}, which leaves the folder of its checkpoints; set dirpath to another one"
    if isinstance(callback, ModelCheckpoint) and str(callback.monitor).startswith("val/"):
        intervals = {
            "every_n_train_steps": callback._every_n_train_steps or None,
            "train_time_interval": callback._train_time_interval,
        }
        for name, value in intervals.items():
            if value is not None:
                return (
                    f"has {name}={value}, where monitor={callback.monitor} is of an earlier step; leave {name} out: it then "
                    "saves after validations"
                )
    return None


def check_filenames(keepers: Iterable[ModelCheckpoint]) -> None:
    """Check that each `ModelCheckpoint` has names of its own: one would delete or replace what another one keeps.

    Raises:
        ValueError: two save under the same name.
    """
    earlier: dict[tuple[Any, ...], ModelCheckpoint] = {}
    for one in keepers:
        if one.save_top_k == 0:
            continue
        other = earlier.setdefault((one.dirpath, one.filename, one.auto_insert_metric_name), one)
        counted = one._enable_version_counter and other._enable_version_counter
        if other is not one and not counted and (one.save_top_k, other.save_top_k) != (-1, -1):
            raise SettingError(
                f"trainer.callbacks: ModelCheckpoint.filename={one.filename} is that of two ModelCheckpoints, monitor="
                f"{other.monitor} and {one.monitor}, of which one would delete what the other keeps; set another one"
            )


def check_loggers(loggers: Iterable[Logger]) -> None:
    """Check that loggers upload no checkpoints: Lightning's pass over folders without a word.

    Raises:
        ValueError: one is to.
    """
    for one in loggers:
        if kept := vars(one).get("_log_model"):  # of MLFlowLogger and WandbLogger
            raise SettingError(
                f"trainer.logger: {type(one).__name__}.log_model={kept} takes checkpoints that are files, and here they are "
                "folders; leave it out, and upload the folder as docs/metrics.md shows"
            )


def check_trainer(trainer: Trainer, stage: str) -> None:
    """Check strategy, precision, ends and callbacks, and make the portable checkpoint the trainer's format.

    Raises:
        ValueError: one of them is not supported.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise SettingError(f"trainer.strategy={type(strategy).__name__} {FSDP_REFUSED}")
    if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, PlacesExperts):
        raise SettingError(f"trainer.strategy={type(strategy).__name__} {DEEPSPEED_REFUSED}")
    if stage == "fit" and getattr(strategy, "_ddp_kwargs", {}).get("static_graph"):  # of DDPStrategy
        raise SettingError(
            "trainer.strategy: DDPStrategy.static_graph=true fails where a step has several micro-batches; leave it out"
        )
    for callback in trainer.callbacks if stage == "fit" else ():  # type: ignore[attr-defined]
        if why := callback_refused(callback, trainer.world_size, getattr(strategy, "expert_parallel_size", 1) > 1):
            raise SettingError(f"trainer.callbacks: {type(callback).__name__} {why}")
    if stage == "fit":
        check_filenames(one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint))
        check_loggers(trainer.loggers)
    for name, why in SETTINGS_REFUSED.items() if stage == "fit" else ():
        if value := getattr(trainer, name):
            raise SettingError(f"trainer.{name}={value} {why}")
    plugin = trainer.precision_plugin
    if stage == "fit" and isinstance(plugin, HalfPrecision) and plugin.precision == "16-true":
        raise SettingError(
            "trainer.precision=16-true trains in fp16 alone, in which squared gradients and AdamW's eps are 0; use "
            "bf16-mixed, or 16-mixed"
        )
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = PortableCheckpointIO()
    if not isinstance(strategy.checkpoint_io, PortableCheckpointIO):
        kind = type(strategy.checkpoint_io).__name__
        raise SettingError(f"trainer.plugins: {kind} writes checkpoints that no run here resumes; remove it")
    strategy.checkpoint_io.to_train = stage == "fit"


def check_memory(
    config: GPTConfig, curriculum: SequenceCurriculum | None, data: HasLargestBatch, trainer: Trainer, stage: str
) -> None:
    """Check that micro-batches can fit, before they are made and the system kills the process.

    Raises:
        ValueError: they cannot.
    """
    value = 2 if "16" in str(trainer.precision) else 4
    memory = total_memory(trainer.strategy.root_device)
    for part in ("fit", "validate") if stage == "fit" and trainer.limit_val_batches else (stage,):
        trains = part == "fit"
        length = curriculum.start if trains and curriculum is not None else config.seq_len
        check_fits(config, *data.largest_batch(part), length, value, trains, memory, trainer.world_size)


def check_vocabulary(config: GPTConfig, data: HasTokenByteLengths) -> None:
    """Check that the model knows every token id of the data.

    Raises:
        ValueError: it does not.
    """
    if data.vocab_size > config.vocab_size:
        raise SettingError(
            f"the data's tokenizer has {data.vocab_size} ids but model.config.vocab_size is {config.vocab_size}; "
            f"set it to {data.vocab_size}"
        )


def require_compiler(device: torch.device) -> None:
    """Check that `torch.compile` can compile for `device`.

    Raises:
        ValueError: it cannot.
    """
    if missing := missing_compiler(device):
        raise SettingError(
            f"model.compile=true needs {missing}, which this machine lacks; install one, or set model.compile to false"
        )


def require_no_stop_iteration(trainer: Trainer) -> None:
    """Check, where an epoch ends, that its steps or data have: Lightning takes any StopIteration for the end of the data.

    The next epoch would begin with what the exception has left, and without a batch there would be no end of epochs.

    Raises:
        ValueError: they have not.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    if not (loop.done or (fetcher.done and loop.batch_progress.current.ready > 0)):
        raise ValueError(STOP_ITERATION.format(trainer.global_step))


def require_completed_epoch(trainer: Trainer) -> None:
    """Check, where a run ends that has not begun at its end, that no StopIteration where an epoch begins or ends has ended it.

    Raises:
        ValueError: one has.
    """
    epochs = trainer.fit_loop.epoch_progress.current
    if epochs.completed < epochs.ready:
        raise ValueError(STOP_ITERATION.format(trainer.global_step))


def warn_about_end(
    config: GPTConfig,
    curriculum: SequenceCurriculum | None,
    schedule: LearningRateSchedule,
    train_tokens: int | None,
    trainer: Trainer,
) -> None:
    """Warn if training has no end, or ends before curriculum or schedule, or the first sample of a part of a blend."""
    stoppers = (Timer, EarlyStopping)
    stopped = any(isinstance(one, stoppers) for one in trainer.callbacks)  # type: ignore[attr-defined]
    if train_tokens is None and trainer.max_steps < 0 and trainer.max_epochs in (None, -1) and not stopped:
        rank_zero_warn(
            "this run has no end; set model.train_tokens, trainer.max_steps or trainer.max_time, or stop it with Ctrl+C"
        )
    if curriculum is not None and train_tokens is not None and curriculum.tokens > train_tokens:
        rank_zero_warn(
            f"model.curriculum.tokens={curriculum.tokens} is above model.train_tokens={train_tokens}: training "
            f"ends before its sequences are {config.seq_len} tokens long; lower it"
        )
    if train_tokens is not None and schedule.decay_tokens is not None and train_tokens < schedule.decay_tokens:
        rank_zero_warn(
            f"model.train_tokens={train_tokens} ends the run before model.schedule.decay_tokens={schedule.decay_tokens}, with "
            f"warmup_tokens={schedule.warmup_tokens}: the learning rate does not fall to its end; set both for this run"
        )
    data: Any = getattr(trainer, "datamodule", None)
    shares = getattr(data, "domain_shares", None)
    if shares is None:
        return
    shortest = config.seq_len if curriculum is None else curriculum.start
    ends = [] if train_tokens is None else [train_tokens / shortest]
    ends += [trainer.max_steps * data.batch_size_after(sys.maxsize)] if trainer.max_steps >= 0 else []
    for domain, share in zip(data.domains, shares, strict=True):
        if share * min(ends, default=math.inf) < 1:
            rank_zero_warn(
                f"{domain} has {share:.2g} of the samples, less than one in the {min(ends):,.0f} of this run; raise the "
                "weight of its part, or remove the part"
            )
