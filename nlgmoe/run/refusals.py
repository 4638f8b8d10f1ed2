"""Refuse options and callbacks of Lightning that would make a run wrong without an error."""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from nlgmoe.checkpoint.portable import PortableCheckpointIO
from nlgmoe.layers.placement import PlacesExperts
from nlgmoe.validation import SettingError

Kinds = type | tuple[type, ...]
_END = "continues a run after its end or a stop; leave it out"
SETTINGS = {  # of a Trainer, unless they are 0 or null
    "min_steps": _END,
    "min_epochs": _END,
    "overfit_batches": "changes the order of sequences, which data.seed determines; give a small data.data_dir",
}
STRATEGIES: dict[Kinds, str] = {
    (FSDPStrategy, ModelParallelStrategy): (
        "divides the weights, which gradient norms and checkpoints here do not support; use nlgmoe.ExpertParallelStrategy, or ddp"
    ),
    DeepSpeedStrategy: "does not support experts; write {class_path: nlgmoe.ExpertParallelStrategy, init_args: {stage: 2}}",
}
CALLBACKS: dict[Kinds, str] = {
    (GradientAccumulationScheduler, BatchSizeFinder): "changes the batch that data.global_batch_size sets; remove it",
    LearningRateFinder: "sets the rate of one optimizer group, not model.schedule's; try values of model.optimizer.lr",
    (StochasticWeightAveraging, WeightAveraging): "replaces the weights that a resumed run needs; remove it",
    (BaseFinetuning, ModelPruning): "changes optimizer groups or names that no checkpoint here holds; remove it",
    OnExceptionCheckpoint: "saves within a step, where weights and clock are of different steps; remove it",
}


def check_trainer(trainer: Trainer, stage: str) -> None:
    """Refuse the options listed above, and make the portable checkpoint the trainer's format."""
    strategy = trainer.strategy
    for kinds, reason in STRATEGIES.items():
        if isinstance(strategy, kinds) and not isinstance(strategy, PlacesExperts):
            raise SettingError(f"trainer.strategy={type(strategy).__name__} {reason}")
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = PortableCheckpointIO()
    if not isinstance(strategy.checkpoint_io, PortableCheckpointIO):
        kind = type(strategy.checkpoint_io).__name__
        raise SettingError(f"trainer.plugins: {kind} writes checkpoints that no run here resumes; remove it")
    strategy.checkpoint_io.to_train = stage == "fit"
    if stage != "fit":
        return
    for name, reason in SETTINGS.items():
        if value := getattr(trainer, name):
            raise SettingError(f"trainer.{name}={value} {reason}")
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        raise SettingError("trainer.val_check_interval as a time depends on the machine's speed; give optimizer steps")
    if trainer.precision == "16-true":
        raise SettingError(
            "trainer.precision=16-true trains in fp16 alone, in which AdamW's eps is 0; use bf16-mixed or 16-mixed"
        )
    if trainer.gradient_clip_algorithm == "value" and isinstance(strategy, PlacesExperts):
        raise SettingError(
            "trainer.gradient_clip_algorithm=value: DeepSpeed does not clip by value; leave it out, or use ddp"
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for classes, reason in CALLBACKS.items():
            if isinstance(callback, classes):
                raise SettingError(f"trainer.callbacks: {type(callback).__name__} {reason}")
        if getattr(callback, "save_on_exception", False):
            name = type(callback).__name__
            raise SettingError(f"trainer.callbacks: {name}.save_on_exception saves within a step; set it to false")
    for logger in trainer.loggers:
        if kept := vars(logger).get("_log_model"):  # of MLFlowLogger and WandbLogger
            raise SettingError(
                f"trainer.logger: {type(logger).__name__}.log_model={kept} uploads checkpoints that are files, here they are "
                "folders; leave it out, and upload the folder as docs/metrics.md shows"
            )
