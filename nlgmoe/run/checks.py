"""Checks of a run before its first step. Each refuses or warns; none changes the run, but `validate_by_steps`.

SETTINGS, STRATEGIES, CALLBACKS   options of Lightning that would make a run wrong without an error: option, reason
check_...                         what does not fit together, or would be lost
warn_...                          an end that comes too early or not at all, and a resumed run that differs from its beginning
"""

from collections.abc import Sequence
from typing import Any

from lightning import Trainer
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from nlgmoe.checkpoint.reading import tokenizer_matches
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data.training_data import TrainingData, training_data
from nlgmoe.lightning_state import set_validation_interval, validates_by_time
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from nlgmoe.parts import IGNORED_IN_EVALUATION
from nlgmoe.pyramid import PlacesExperts
from nlgmoe.ranks import AllRanksError
from nlgmoe.validation import RunError, SettingError, list_differences

Kinds = type | tuple[type, ...]
_END = "continues a run after its end or a stop; leave it out"
PRECISIONS = ("bf16-mixed", "16-mixed", "bf16-true", "32-true", "64-true")
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
CALLBACKS = (  # each changes weights, batch or optimizer groups
    callbacks.GradientAccumulationScheduler,
    callbacks.BatchSizeFinder,
    callbacks.LearningRateFinder,
    callbacks.StochasticWeightAveraging,
    callbacks.WeightAveraging,
    callbacks.BaseFinetuning,
    callbacks.ModelPruning,
)


def check_trainer(trainer: Trainer, stage: str) -> None:
    """Refuse the options listed above."""
    strategy = trainer.strategy
    for kinds, reason in STRATEGIES.items():
        if isinstance(strategy, kinds) and not isinstance(strategy, PlacesExperts):
            raise SettingError(f"trainer.strategy={type(strategy).__name__} {reason}")
    if stage != "fit":
        return
    for name, reason in SETTINGS.items():
        if value := getattr(trainer, name):
            raise SettingError(f"trainer.{name}={value} {reason}")
    if validates_by_time(trainer):
        raise SettingError("trainer.val_check_interval as a time depends on the machine's speed; give optimizer steps")
    if trainer.precision not in PRECISIONS:  # in 16-true, eps is 0
        raise SettingError(f"trainer.precision={trainer.precision} does not train here; use {', '.join(PRECISIONS)}")
    if trainer.gradient_clip_algorithm == "value":
        raise SettingError(
            "trainer.gradient_clip_algorithm=value: gradients are clipped to a norm alone; use norm, or null"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, CALLBACKS):
            raise SettingError(
                f"trainer.callbacks: {name} changes weights, batch or optimizer that a resumed run needs; remove it"
            )
        if isinstance(callback, callbacks.OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False):
            problem = f"{name} saves within a step, where weights and clock are of different steps"
            raise SettingError(f"trainer.callbacks: {problem}; remove it, or set save_on_exception to false")


def check_vocabulary(config: GPTConfig, data: TrainingData) -> None:
    """Check that the model's vocabulary covers the token ids of the data."""
    if data.vocab_size > config.vocab_size:
        problem = f"the data's tokenizer has {data.vocab_size} ids but model.config.vocab_size is {config.vocab_size}"
        raise SettingError(f"{problem}; set it to {data.vocab_size}, or data.tokenizer to the model's")


def check_lengths(config: GPTConfig, seq_len: int, curriculum: SequenceCurriculum | None) -> None:
    """Check that the model reads sequences as long as the data's, `seq_len` tokens, and that a curriculum begins below that."""
    if seq_len > config.seq_len:
        problem = f"data.seq_len={seq_len} is above model.config.seq_len={config.seq_len}"
        raise SettingError(f"{problem}, the longest sequence that the model reads; lower it, or raise the model's")
    if curriculum is not None and curriculum.start > seq_len:
        raise SettingError(f"model.curriculum.start={curriculum.start} is above data.seq_len={seq_len}; lower it")


def warn_about_end(
    seq_len: int,
    curriculum: SequenceCurriculum | None,
    schedule: LearningRateSchedule,
    train_tokens: int | None,
    trainer: Trainer,
) -> None:
    """Warn if training has no end, or ends before curriculum or schedule."""
    stoppers = (callbacks.Timer, callbacks.EarlyStopping)
    stopped = any(isinstance(callback, stoppers) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if train_tokens is None and trainer.max_steps < 0 and trainer.max_epochs in (None, -1) and not stopped:
        rank_zero_warn("this run has no end but Ctrl+C; set model.train_tokens, trainer.max_steps or trainer.max_time")
    if curriculum is not None and train_tokens is not None and curriculum.tokens > train_tokens:
        problem = f"model.curriculum.tokens={curriculum.tokens} is above model.train_tokens={train_tokens}"
        rank_zero_warn(f"{problem}: training ends before its sequences are {seq_len} tokens long; lower it")
    if train_tokens is not None and schedule.decay_tokens is not None and train_tokens < schedule.decay_tokens:
        problem = f"model.train_tokens={train_tokens} is below model.schedule.decay_tokens={schedule.decay_tokens}"
        remedy = f"set decay_tokens, and warmup_tokens={schedule.warmup_tokens}, for this length"
        rank_zero_warn(f"{problem}: the learning rate does not fall to its end; {remedy}")


def warn_of_another_size(before: dict[str, int], now: dict[str, int], moe: MoEConfig | None) -> None:
    """Warn if the next step of a resumed run differs in size from that of the checkpoint's run."""
    saved = "when the checkpoint was saved, now it has"
    if "samples" in before and "samples" in now and before["samples"] != now["samples"]:
        remedy = "data.global_batch_size and data.batch_ramp_up keep it the same on any number of ranks"
        rank_zero_warn(f"a step had {before['samples']} sequences {saved} {now['samples']}; {remedy}")
        return
    old, new = (size["ranks"] * size["micro_batches"] for size in (before, now))
    if moe is not None and old != new:
        problem = f"a step had {old} micro-batches over all ranks {saved} {new}: each has its capacity and balance loss"
        rank_zero_warn(f"{problem}; restore data.micro_batch_size to keep the losses the same")
    if moe is not None and moe.aux_scope == "global" and before["ranks"] != now["ranks"]:
        ranks = f"{now['ranks']} ranks together, and did over {before['ranks']} when the checkpoint was saved"
        rank_zero_warn(f"model.config.moe.aux_scope=global balances the load over {ranks}: the balance loss differs")


def warn_of_repeated_data(trainer: Trainer) -> None:
    """Warn if a resumed run's training data are no `TrainingData`."""
    if trainer.global_step > 0 and training_data(trainer) is None:
        problem = f"the run goes on at step {trainer.global_step} with data that may repeat, skip or begin again"
        rank_zero_warn(f"{problem}: they are no nlgmoe.data.TrainingData")


def check_optimizer(trainer: Trainer) -> None:
    """Check that `configure_optimizers` of a subclass has returned what steps and checkpoints need."""
    (optimizer,) = trainer.optimizers
    if not all("decays" in group for group in optimizer.param_groups):
        problem = f"configure_optimizers returns {type(optimizer).__name__}, but checkpoints need nlgmoe's optimizer"
        raise SettingError(f"{problem}: return super().configure_optimizers(), and set model.optimizer")
    if trainer.lr_scheduler_configs:
        problem = "configure_optimizers returns a learning-rate scheduler, but model.schedule sets the rate"
        raise SettingError(f"{problem}: return the optimizer alone")


def validate_by_steps(trainer: Trainer) -> None:
    """Make `trainer.val_check_interval` count optimizer steps, as `log_every_n_steps` does, not micro-batches."""
    interval = trainer.val_check_interval
    if not isinstance(interval, int):
        return
    batches = interval * trainer.accumulate_grad_batches
    set_validation_interval(trainer, batches)
    by_epoch = trainer.check_val_every_n_epoch is not None and trainer.enable_validation
    if by_epoch and batches > trainer.num_training_batches:
        problem = f"{interval} steps are {batches} micro-batches, and an epoch has {trainer.num_training_batches}"
        remedy = "lower it, or set trainer.check_val_every_n_epoch=null to count steps over epochs"
        raise SettingError(f"trainer.val_check_interval={problem}: no epoch would have a validation; {remedy}")


def check_same_run(checkpoint: dict[str, Any], config: GPTConfig, seed: int | None, path: Any) -> None:
    """Check that a checkpoint belongs to this model and, in training, to this run.

    Args:
        seed: seed of this run; None in evaluation, which ignores settings that only affect training.
    """
    resumes = seed is not None
    if resumes and "callbacks" not in checkpoint:  # `ModelCheckpoint(save_weights_only=True)`
        remedy = f"start a new run from it with model.warm_start.checkpoint={path}"
        raise SettingError(f"{path} holds weights only: {remedy}")
    ignored = frozenset() if resumes else IGNORED_IN_EVALUATION
    if not resumes and config.moe is not None and config.moe.router is not None:
        ignored |= config.moe.router.ignored_in_evaluation
    saved = GPTConfig.from_dict(checkpoint["model_config"]).to_dict()  # fields that it lacks get their defaults
    if different := list_differences(saved, config.to_dict(), ignored):
        shorter = "; data.seq_len makes sequences shorter" if saved["seq_len"] != config.seq_len else ""
        problem = f"the checkpoint's model differs from model.config: {', '.join(different)}"
        raise SettingError(f"{problem}; set model.config as the run had it{shorter}")
    if resumes and checkpoint["seed"] != seed:
        raise SettingError(f"the checkpoint's run has model.seed {checkpoint['seed']}, not {seed}; set it to resume")


def check_moments(checkpoint: dict[str, Any], frozen: Sequence[str], muon: bool) -> None:
    """Check that a checkpoint has the moments that this run needs: of the components that it trains, of its optimizer."""
    remedy = "set it as it was, or start a new run with model.warm_start"
    now, before = sorted(frozen), checkpoint.get("frozen", [])
    if now != before:
        problem = f"was {before} in the checkpoint's run, which has moments of the other components only"
        raise SettingError(f"model.optimizer.frozen={now} {problem}; {remedy}")
    if muon != checkpoint.get("muon", False):
        setting, used = ("{}", "AdamW alone") if muon else ("null", "Muon")
        problem = f"model.optimizer.muon={setting}: the checkpoint's run had {used}, which has other moments"
        raise SettingError(f"{problem}; {remedy}")


def check_tokenizer(checkpoint: dict[str, Any], data: TrainingData | None) -> None:
    """Check the tokenizer of a checkpoint without a data module's state; with it, the data module compares the tokenizer."""
    if data is None or type(data).__qualname__ in checkpoint:
        return
    if data.tokenizer is not None and not tokenizer_matches(data.tokenizer.files, checkpoint.get("tokenizer")):
        raise RunError(f"{checkpoint['path']} has another tokenizer than data.tokenizer; set it to the checkpoint's")


def check_new_run(trainer: Trainer, tokens: int) -> None:
    """Check that a run that resumes nothing begins at the beginning."""
    data = training_data(trainer)
    samples = 0 if data is None else data.samples_consumed
    if trainer.ckpt_path is None and (trainer.global_step or tokens or samples):
        state = f"a trainer at step {trainer.global_step}, a module at token {tokens} or data at sample {samples}"
        remedy = "make all anew, or resume the earlier run with trainer.fit(..., ckpt_path=CHECKPOINT)"
        raise AllRanksError(f"a new run cannot begin with {state}: {remedy}")
