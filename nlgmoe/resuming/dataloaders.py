"""What a run needs of a dataloader that is not nlgmoe's own: to go on at its step, and over each epoch once."""

from __future__ import annotations

import math
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DistributedSampler

from nlgmoe.batch import TracksSamples
from nlgmoe.checkpoint.agreement import AllRanksSettingError

_AFTER_STEP = (
    "was saved {} micro-batches after its last optimizer step, and the dataloader's own state is behind them; save at steps, "
    "with trainer.val_check_interval a multiple of accumulate_grad_batches"
)


def problem_of_dataloader(checkpoint: dict[str, Any], max_epochs: int | None) -> str | None:
    """Return why a dataloader that keeps its own state, such as torchdata's `StatefulDataLoader`, does not go on at the step.

    Args:
        checkpoint: Lightning's dictionary, after loading.
        max_epochs: of this run.

    Returns:
        It was saved some micro-batches after the step, or at an epoch's last batch, where nothing is left of the epoch; None: it
        goes on, or there is no such dataloader.
    """
    loop = checkpoint["loops"]["fit_loop"]
    if not loop["state_dict"].get("combined_loader"):
        return None
    if after := checkpoint.get("micro_batches_after_step"):
        return f"{_AFTER_STEP.format(after)}; resume another one"
    epochs = loop["epoch_progress"]["current"]
    if loop["epoch_loop.batch_progress"]["is_last_batch"] and epochs["processed"] < epochs["ready"] != max_epochs:
        return (
            "was saved at the last step of an epoch, before its end, where the dataloader's own state has no batch left: resume "
            "another one; ModelCheckpoint with save_on_train_epoch_end=True saves at the end"
        )
    return None


def batches_of_ended_epoch(checkpoint: dict[str, Any]) -> int | None:
    """Return how many batches an epoch had that has ended with the checkpoint, which has a dataloader's own state; else None."""
    loop = checkpoint["loops"]["fit_loop"]
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]["current"]
    ended = batches["is_last_batch"] and epochs["processed"] >= epochs["ready"]
    return batches["current"]["ready"] if ended and loop["state_dict"].get("combined_loader") else None


def warn_of_dataloader(checkpoint: dict[str, Any], after: int) -> None:
    """Note in a checkpoint how many micro-batches after the step it is saved, if a dataloader's own state is behind them."""
    if after and checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader"):
        checkpoint["micro_batches_after_step"] = after
        rank_zero_warn(f"a checkpoint that no run can resume: it {_AFTER_STEP.format(after)}")


def require_whole_epochs(
    trainer: Trainer, other_steps: bool, of_dataloader: str | None, ended: int | None = None
) -> None:
    """Check that a run that has steps to take goes over each epoch of data that have an end once.

    Args:
        trainer: of the fit that begins.
        other_steps: whether it goes on within an epoch of steps of more or fewer micro-batches.
        of_dataloader: `problem_of_dataloader` of its checkpoint.
        ended: `batches_of_ended_epoch` of its checkpoint.

    Raises:
        AllRanksSettingError: it does not: `of_dataloader`; `ended` with `max_steps`, where Lightning goes back to the state of a
            dataloader of which `limit_train_batches` had left some; `other_steps`, where Lightning miscounts the rest of an
            epoch; or DeepSpeed's engine, which counts the micro-batches of all epochs, would step at others than Lightning.
    """
    batches, window = trainer.num_training_batches, trainer.accumulate_grad_batches
    if of_dataloader is not None:
        raise AllRanksSettingError(f"{trainer.ckpt_path} {of_dataloader}")
    if batches == math.inf:
        return
    if ended is not None and trainer.max_steps >= 0:
        loaders = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
        if any(length is None or length > ended for length in map(sized_len, loaders)):
            raise AllRanksSettingError(
                f"{trainer.ckpt_path} is of the end of an epoch of {ended} batches, behind which the dataloader's own state goes "
                "on where trainer.max_steps is set: resume another one, or leave max_steps out and set max_epochs"
            )
    if other_steps:
        raise AllRanksSettingError(
            f"trainer.accumulate_grad_batches={window} is not that of the checkpoint's run, in an epoch that has begun: set it "
            "as before, or resume a checkpoint of an epoch's end"
        )
    last_epoch = 0 <= (-1 if trainer.max_epochs is None else trainer.max_epochs) <= trainer.current_epoch + 1
    in_one_epoch = last_epoch or 0 <= trainer.max_steps <= batches // window
    if trainer.strategy.handles_gradient_accumulation and batches % window and not in_one_epoch:
        remedy = f"limit_train_batches={batches // window * window}" if batches >= window else "it lower"
        raise AllRanksSettingError(
            f"trainer.accumulate_grad_batches={window} does not divide an epoch's {batches} micro-batches, and DeepSpeed would "
            f"take those that are left for the next epoch's first step; set {remedy}"
        )


def warn_of_repeated_data(trainer: Trainer) -> None:
    """Warn if a resumed run takes endless data from their beginning again; of data with an end Lightning warns."""
    data, loader = getattr(trainer, "datamodule", None), trainer.fit_loop._combined_loader
    keeps = isinstance(data, TracksSamples) or (data is not None and is_overridden("state_dict", data))
    keeps |= loader is not None and all(isinstance(one, _Stateful) for one in loader.flattened)
    if trainer.global_step > 0 and trainer.num_training_batches == math.inf and not keeps:
        rank_zero_warn(
            f"the run goes on at step {trainer.global_step}, but its training data begin again: neither the data module nor its "
            "dataloader has a state_dict; nlgmoe.batch.TracksSamples says what a data module needs"
        )


def warn_of_repeated_samples(loaders: Any) -> None:
    """Warn of samples that a validation on ranks counts twice: Lightning's sampler gives each rank equally many."""
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        sampler = getattr(loader, "sampler", None)
        if type(sampler) is DistributedSampler and (twice := sampler.total_size - len(loader.dataset)) > 0:
            rank_zero_warn(
                f"val/loss counts {twice} of {len(loader.dataset)} samples twice, so that {sampler.num_replicas} ranks have "
                "equally many; add samples without tokens (token_mask), or leave some out"
            )
