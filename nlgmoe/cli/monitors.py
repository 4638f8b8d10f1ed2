"""Check that callbacks monitor logged metrics; Lightning would end the run at the first validation."""

from __future__ import annotations

from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from nlgmoe.batch import HasTokenByteLengths
from nlgmoe.callbacks.expert_load import ExpertLoad
from nlgmoe.callbacks.staged_distillation import LOGGED
from nlgmoe.callbacks.throughput import Throughput
from nlgmoe.cli.errors import did_you_mean
from nlgmoe.layers.routers import SigmoidTopK
from nlgmoe.module import MoEGPTModule
from nlgmoe.validation import SettingError


def check_monitors(trainer: Trainer, module: MoEGPTModule) -> None:
    """Check every callback's `monitor`, once the data are there; warn where the run validates too late for it.

    Where a callback or the router is of neither this package nor Lightning nothing is known: it may log what it likes.

    Raises:
        ValueError: a callback waits for what is never logged.
    """
    parts = [*trainer.callbacks, *filter(None, [module.config.moe and module.config.moe.router])]  # type: ignore[attr-defined]
    packages = {type(part).__module__.split(".")[0] for part in parts}
    known = type(module) is MoEGPTModule and not packages - {"nlgmoe", "lightning"}
    names = logged_names(trainer, module) if known else set()
    # By `nlgmoe.ZeroShotEval`; at other steps it writes to the loggers alone.
    at_validations = any(getattr(one, "at_validation", False) for one in trainer.callbacks)  # type: ignore[attr-defined]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, ModelCheckpoint | EarlyStopping) or callback.monitor is None:
            continue
        of_task = at_validations and str(callback.monitor).startswith("zero_shot/")
        if known and callback.monitor not in names and not of_task:
            listed = ", ".join(sorted(name for name in names if not name.startswith("experts/")))
            raise SettingError(
                f"trainer.callbacks: {type(callback).__name__}.monitor={callback.monitor} is not logged by this run"
                f"{did_you_mean(str(callback.monitor), names) or '.'} It logs {listed}"
            )
        steps, seconds = getattr(callback, "_every_n_train_steps", 0), getattr(callback, "_train_time_interval", None)
        between = seconds is not None or steps % trainer.log_every_n_steps  # type: ignore[attr-defined]
        if between and callback.monitor in interval_names(trainer, module):
            raise SettingError(
                f"trainer.callbacks: ModelCheckpoint.monitor={callback.monitor} is logged every trainer.log_every_n_steps="
                f"{trainer.log_every_n_steps} steps, so that "  # type: ignore[attr-defined]
                f"{f'every_n_train_steps={steps}' if steps else 'train_time_interval'} would take an earlier step's; set "
                "every_n_train_steps to a multiple"
            )
        if of_task and (steps or seconds is not None):
            raise SettingError(
                f"trainer.callbacks: ModelCheckpoint.monitor={callback.monitor} is of an earlier step between validations, "
                f"at which ZeroShotEval evaluates; leave {'every_n_train_steps' if steps else 'train_time_interval'} out: it "
                "then saves after validations"
            )
        after_validation = isinstance(callback, EarlyStopping) or callback._every_n_epochs > 0
        if after_validation and not isinstance(trainer.val_check_interval, int):
            rank_zero_warn(
                f"{type(callback).__name__}.monitor={callback.monitor} is read after a validation, and that comes at the end of "
                "the run only; set trainer.val_check_interval to validate before"
            )


def logged_names(trainer: Trainer, module: MoEGPTModule) -> set[str]:
    """All that a run of `fit` logs, with Lightning's own `epoch` and `step`."""
    names = {"epoch", "step", *(f"train/{name}" for name in ("loss", "lr", "tokens", "grad_norm", "skipped_steps"))}
    if module.config.moe is not None:
        names |= {"train/balance_loss", "train/z_loss"}
        if isinstance(module.config.moe.router, SigmoidTopK) and module.config.moe.router.sequence_loss_coeff:
            names.add("train/sequence_balance_loss")
    if module.curriculum is not None:
        names.add("train/seq_len")
    if module.distiller is not None:
        names |= set(LOGGED)
    names |= interval_names(trainer, module)
    if trainer.enable_validation:
        data = getattr(trainer, "datamodule", None)
        domains = [f"/{name}" for name in data.domains] if isinstance(data, HasTokenByteLengths) else ["/all"]
        metrics = ("loss", "perplexity", *(["bits_per_byte"] if isinstance(data, HasTokenByteLengths) else []))
        names |= {f"val/{metric}{domain}" for metric in metrics for domain in ["", *domains]}
        names |= {"val/blend_loss"} if getattr(data, "domain_shares", None) else set()
    return names


def interval_names(trainer: Trainer, module: MoEGPTModule) -> set[str]:
    """Return what callbacks log once an interval of logging, not at every step."""
    names: set[str] = set()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ExpertLoad | Throughput):
            names |= callback.logged_names(trainer, module)
        if isinstance(callback, LearningRateMonitor):
            names |= callback.lrs.keys()
            names |= callback.last_momentum_values.keys() if callback.log_momentum else set()
            names |= callback.last_weight_decay_values.keys() if callback.log_weight_decay else set()
    return names
