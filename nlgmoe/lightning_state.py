"""Lightning 2.6's private state: no other file reads or sets it (`tests/test_private_names.py`).

Each docstring says what the function does, and which public API is missing. Other files may override private methods.

Progress state of Lightning that the package sets:

    batch_progress           `set_progress`, in a checkpoint: to the values at `on_train_batch_end` of the last step:
                             its last micro-batch is processed but not completed; the loop's `reset` completes it
    _batches_that_stepped    `set_progress`, in a checkpoint: to step - 1, since the loop's `reset` adds 1.
                             `set_loggers_step` in `step.py`: to `global_step` before each micro-batch, since Lightning
                             loses it in a run that is resumed at its end.
                             `set_loggers_step` in `module.py`: to step - 1 when a checkpoint is evaluated, so that
                             loggers get the same step as for the validation of that step in training
    val_loop.batch_progress  `set_progress`, in a checkpoint: to 0. `Resuming.begin` runs a pending validation, since
                             Lightning's own restart checks the wrong micro-batch at the end of an epoch
    epoch_loop.max_steps     `set_max_steps` in `run/resume.py`: to -1 when a checkpoint at `max_steps` is loaded, until
                             `on_train_start`. At `max_steps` Lightning would not call `on_train_start`
    val_check_batch          `set_validation_interval` in `run/checks.py`: to the micro-batches of `val_check_interval`
                             optimizer steps, before each micro-batch. Lightning counts micro-batches, and resets this
                             with `reload_dataloaders_every_n_epochs`
    should_stop              a public attribute.
                             `module.py`: to False in `on_fit_start`. If a `Timer` has set it to True, Lightning does
                             not call `on_train_start`.
                             `run/resume.py`: to True if the resumed run is at its end.
                             `step.py`: to True after the last step; a stop inside a step is postponed to its end
"""

import os
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.strategies.strategy import Strategy

# ---- steps


def ends_step(trainer: Trainer) -> bool:
    """Return True for the last micro-batch of an optimizer step. The loop has no public property for it."""
    return not trainer.fit_loop._should_accumulate()


def logs_this_step(trainer: Trainer) -> bool:
    """Return True if Lightning logs this step: every `log_every_n_steps` steps, and if `should_stop` is set.

    The trainer has no public property for it.
    """
    return trainer._logger_connector.should_update_logs


def loggers_step(trainer: Trainer) -> int:
    """Return the step that loggers get: at the end of a step, `global_step` - 1. It has no public property."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_loggers_step(trainer: Trainer, step: int) -> None:
    """Set the step that loggers get. The loop counts it separately from `global_step`, without a public setter."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def set_max_steps(trainer: Trainer, steps: int) -> None:
    """Set `trainer.max_steps`, a property without a setter."""
    trainer.fit_loop.epoch_loop.max_steps = steps


def training_is_done(trainer: Trainer) -> bool:
    """Return True after the last step of the run or epoch. `global_step` and `max_steps` do not tell an epoch's end."""
    return trainer.fit_loop.epoch_loop._is_training_done


# ---- validations of a fit


def set_validation_interval(trainer: Trainer, micro_batches: int) -> None:
    """Set the number of micro-batches between validations. Lightning sets it when it loads data; no public setter."""
    trainer.val_check_batch = micro_batches


def validates_by_time(trainer: Trainer) -> bool:
    """Return True if `val_check_interval` is a time, which Lightning stores in this private attribute only."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def validation_is_due(trainer: Trainer) -> bool:
    """Return True at the end of a step after which Lightning validates. The method and its argument are private."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def run_validation(trainer: Trainer) -> None:
    """Validate inside a fit, as the loop does after a step. `Trainer.validate` would end the fit."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


# ---- checkpoints


def set_progress(checkpoint: dict[str, Any], micro_batches: int, saved: bool = False) -> None:
    """Set the progress of Lightning's loops in a checkpoint to the last optimizer step.

    Lightning saves the current counts, which may be those inside a step or an epoch. It has no hook that sets them.

    Args:
        checkpoint: Lightning's dictionary, with `loops`.
        micro_batches: number of micro-batches of an optimizer step.
        saved: True if the dictionary was read from a file, False if it is about to be written.
    """
    loop, step = checkpoint["loops"]["fit_loop"], checkpoint["global_step"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    # `current` counts this epoch, `total` all epochs. An epoch's last step may have fewer micro-batches.
    progress = loop["epoch_loop.batch_progress"]
    ready, taken = progress["current"]["ready"], steps["current"]["completed"] * micro_batches
    progress["is_last_batch"] = progress["is_last_batch"] and (saved or taken >= ready)
    current = ready if progress["is_last_batch"] else taken
    within = 0 <= ready - current < micro_batches  # else steps had another number of micro-batches, or a new one began
    total = progress["total"]["ready"] - (ready - current) if within else steps["total"]["completed"] * micro_batches
    for key, batches in {"total": total, "current": current}.items():
        counts = dict.fromkeys(("ready", "started", "processed"), batches)
        progress[key] |= counts | {"completed": max(0, batches - 1)}
        loop["epoch_loop.val_loop.batch_progress"][key] |= dict.fromkeys([*counts, "completed"], 0)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1


# ---- the trainer and its parts


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return a module's trainer, or None. Without a trainer, `module.trainer` raises an error."""
    return module._trainer


def data_module_of(trainer: Trainer) -> Any:
    """Return the data module of this call, or None. `trainer.datamodule` may be that of an earlier call."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule if trainer.fit_loop._data_source.instance is datamodule else None


def set_root_folder(trainer: Trainer, folder: str) -> None:
    """Set `trainer.default_root_dir`, a property without a setter."""
    trainer._default_root_dir = folder  # type: ignore[attr-defined]


def cluster_environment(trainer: Trainer) -> Any:
    """Return the cluster environment. `SingleDeviceStrategy`, unlike other strategies, does not have it."""
    return trainer._accelerator_connector.cluster_environment


def started_processes(strategy: Strategy) -> list[subprocess.Popen[Any]]:
    """Return the processes that this one has started as ranks. The class of the launcher is private."""
    launcher = strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def leave_signals_to_callbacks(trainer: Trainer) -> None:
    """Replace two signal methods by functions that do nothing. The trainer has no option to disable signal handling.

    `register_signal_handlers` installs handlers that run a broadcast (on Slurm, also a save) inside the handler. This
    deadlocks if other ranks wait in another collective. `_broadcast_sigterm_tensor` is a blocking broadcast in every
    micro-batch; after it, SIGTERM ends the run with exit code 0 and without a checkpoint.
    """
    vars(trainer._signal_connector)["register_signal_handlers"] = lambda: None
    vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = lambda: None


def csv_writer_of(logger: CSVLogger, writer: Callable[[str], ExperimentWriter]) -> ExperimentWriter:
    """Return the writer of a CSV logger. The first call creates it by `writer(folder)`.

    `CSVLogger.finalize` saves the writer in this private attribute. `CSVLogger` has no argument for the writer's class.
    """
    if logger._experiment is None:
        os.makedirs(logger.log_dir, exist_ok=True)
        logger._experiment = writer(logger.log_dir)
    return logger._experiment  # type: ignore[return-value]


# ---- DeepSpeedStrategy


def init_deepspeed(strategy: DeepSpeedStrategy) -> None:
    """Initialise DeepSpeed's communication on any device. `setup_distributed`, its public caller, refuses CPUs."""
    strategy._init_deepspeed_distributed()


def weights_dtype(strategy: DeepSpeedStrategy) -> torch.dtype:
    """Return the dtype of the engine's weights. The public `precision` is a string."""
    precision = strategy.precision_plugin
    assert isinstance(precision, DeepSpeedPrecision)
    return precision._desired_dtype
