"""Lightning 2.6's private state: no other file reads or sets it (`tests/test_private_names.py`).

Each function gives what Lightning does, and the public way that is missing. Classes elsewhere override private methods.

Fields of Lightning's progress that are set, by the functions of this file unless another place is named:

    batch_progress              `set_progress`: to its state in `on_train_batch_end` of the last step: the last micro-batch is
                                processed, but not completed; `reset` of the loop completes it
    _batches_that_stepped       `set_progress`: to step - 1 in a checkpoint, for the same reason: `reset` adds 1.
                                `set_loggers_step`: to the last step before every batch, since Lightning loses it if a run is
                                resumed at an end (`step.py`); to step - 1 in the evaluation of a checkpoint, so that loggers get
                                the step of training's own validation (`module.py`)
    val_loop.batch_progress     `set_progress`: to none: `Resuming.begin` runs a pending validation, since Lightning's own restart
                                of one looks at the wrong batch at the end of an epoch
    epoch_loop.max_steps        `set_max_steps`: to -1 from loading to `on_train_start`, which Lightning does not reach at
                                `max_steps` (`run/resume.py`)
    val_check_batch             `set_validation_interval`: to `val_check_interval` optimizer steps before every batch: Lightning
                                counts micro-batches, and sets it anew with `reload_dataloaders_every_n_epochs` (`run/checks.py`)
    should_stop                 public. `module.py`: to False in `on_fit_start`, where a `Timer` may have set it, with the same
                                effect as `max_steps`. `run/resume.py`: to True at a run's end. `step.py`: to True at
                                `train_tokens`, and postponed to the end of an accumulation window
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
    """Return True for the last micro-batch of an optimizer step. The loop decides it, and has no public property of it."""
    return not trainer.fit_loop._should_accumulate()


def logs_this_step(trainer: Trainer) -> bool:
    """Return True for a step that Lightning logs; the last step of a run too, once it is known to be the last.

    The rule takes in `log_every_n_steps`, `should_stop` and the loop that runs; the trainer does not show its result.
    """
    return trainer._logger_connector.should_update_logs


def loggers_step(trainer: Trainer) -> int:
    """Return the step that loggers get. It is one less than `global_step` at the end of a step; no public name has it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_loggers_step(trainer: Trainer, step: int) -> None:
    """Set the step that loggers get, which the loop counts by itself; a public setter is missing."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def set_max_steps(trainer: Trainer, steps: int) -> None:
    """Set `trainer.max_steps`, a property without a setter."""
    trainer.fit_loop.epoch_loop.max_steps = steps


def training_is_done(trainer: Trainer) -> bool:
    """Return True after the last step of the run or the epoch. `global_step` and `max_steps` do not show an epoch's end."""
    return trainer.fit_loop.epoch_loop._is_training_done


# ---- validations of a fit


def set_validation_interval(trainer: Trainer, micro_batches: int) -> None:
    """Set the micro-batches between validations. Lightning computes them from `val_check_interval` when it loads data."""
    trainer.val_check_batch = micro_batches


def validates_by_time(trainer: Trainer) -> bool:
    """Return True if `val_check_interval` is a time, which Lightning keeps under this name alone."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def validation_is_due(trainer: Trainer) -> bool:
    """Return True at the end of a step that Lightning validates. The loop's rule and its argument are private."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def run_validation(trainer: Trainer) -> None:
    """Validate within a fit, as the loop does after a step: `Trainer.validate` would end the fit."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


# ---- checkpoints


def set_progress(checkpoint: dict[str, Any], micro_batches: int, saved: bool = False) -> None:
    """Set the progress of Lightning's loops in a checkpoint to the last optimizer step.

    Lightning saves the counts of the moment, which may be within a step or an epoch; a hook that sets them is missing.

    Args:
        checkpoint: Lightning's dictionary, with `loops`.
        micro_batches: of an optimizer step.
        saved: the dictionary is from a file, not about to be saved.
    """
    loop, step = checkpoint["loops"]["fit_loop"], checkpoint["global_step"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    # `current` counts this epoch, `total` all epochs. An epoch's last step may have fewer micro-batches.
    progress = loop["epoch_loop.batch_progress"]
    ready, taken = progress["current"]["ready"], steps["current"]["completed"] * micro_batches
    progress["is_last_batch"] = progress["is_last_batch"] and (saved or taken >= ready)
    current = ready if progress["is_last_batch"] else taken
    within = 0 <= ready - current < micro_batches  # else steps had another number of them, or the next one has begun
    total = progress["total"]["ready"] - (ready - current) if within else steps["total"]["completed"] * micro_batches
    for key, batches in {"total": total, "current": current}.items():
        counts = dict.fromkeys(("ready", "started", "processed"), batches)
        progress[key] |= counts | {"completed": max(0, batches - 1)}
        loop["epoch_loop.val_loop.batch_progress"][key] |= dict.fromkeys([*counts, "completed"], 0)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1


# ---- the trainer and its parts


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return a module's trainer; None without one, where `module.trainer` raises an error."""
    return module._trainer


def data_module_of(trainer: Trainer) -> Any:
    """Return the data module of this call, or None. `trainer.datamodule` keeps that of an earlier call."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule if trainer.fit_loop._data_source.instance is datamodule else None


def set_root_folder(trainer: Trainer, folder: str) -> None:
    """Set `trainer.default_root_dir`, a property without a setter."""
    trainer._default_root_dir = folder  # type: ignore[attr-defined]


def cluster_environment(trainer: Trainer) -> Any:
    """Return the environment of the processes. The strategy of a single device, unlike others, does not have it."""
    return trainer._accelerator_connector.cluster_environment


def started_processes(strategy: Strategy) -> list[subprocess.Popen[Any]]:
    """Return the ranks that this process has started; the class of the launcher that has them is private."""
    launcher = strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def leave_signals_to_callbacks(trainer: Trainer) -> None:
    """Replace two signal methods by functions that do nothing: a trainer cannot be told to leave signals alone.

    `register_signal_handlers` installs handlers that broadcast, and on Slurm save, within the handler, which deadlocks with ranks
    that wait in another collective; `_broadcast_sigterm_tensor` is a blocking broadcast in every micro-batch, after which
    SIGTERM ends the run with exit code 0 and nothing saved.
    """
    vars(trainer._signal_connector)["register_signal_handlers"] = lambda: None
    vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = lambda: None


def csv_writer_of(logger: CSVLogger, writer: Callable[[str], ExperimentWriter]) -> ExperimentWriter:
    """Return the writer of a CSV logger, which `writer` makes of the folder at the first call.

    `CSVLogger.finalize` saves what this field has; the class of the writer is no argument.
    """
    if logger._experiment is None:
        os.makedirs(logger.log_dir, exist_ok=True)
        logger._experiment = writer(logger.log_dir)
    return logger._experiment  # type: ignore[return-value]


# ---- DeepSpeedStrategy


def init_deepspeed(strategy: DeepSpeedStrategy) -> None:
    """Initialise DeepSpeed's communication on any device; `setup_distributed`, which calls this, refuses CPUs."""
    strategy._init_deepspeed_distributed()


def weights_dtype(strategy: DeepSpeedStrategy) -> torch.dtype:
    """Return the type of the engine's weights, which `precision` has as a word only."""
    precision = strategy.precision_plugin
    assert isinstance(precision, DeepSpeedPrecision)
    return precision._desired_dtype
