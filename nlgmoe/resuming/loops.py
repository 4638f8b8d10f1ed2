"""The counters of Lightning's training loop in a checkpoint."""

from __future__ import annotations

import math
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from nlgmoe.checkpoint.agreement import AllRanksSettingError

_AFTER_STEP = (
    "was saved {} micro-batches after its last optimizer step, and the dataloader's own state is behind them; save at steps, "
    "with trainer.val_check_interval a multiple of accumulate_grad_batches"
)


def set_loop_counters(checkpoint: dict[str, Any], micro_batches: int, validated: bool, saved: bool = False) -> int:
    """Set Lightning's loops to the last optimizer step, before or after the validation of that step.

    The training loop gets its state in `on_train_batch_end` of the step's last micro-batch, where Lightning's own checkpoints are
    saved: that batch is processed but not yet completed. Lightning restarts a validation that is due at that step if one batch is
    ready and none processed.

    Args:
        checkpoint: Lightning's dictionary, before saving or after loading.
        micro_batches: accumulated micro-batches of a step in this run.
        validated: true if a validation was completed at this step.
        saved: true after loading.

    Returns:
        Micro-batches after the step. After loading: 0, or any other number where `micro_batches` was another one.
    """
    loop, step = checkpoint["loops"]["fit_loop"], checkpoint["global_step"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    # Of this epoch, and of all, which data or a trainer in code may have. An epoch's last step may have fewer micro-batches.
    progress = loop["epoch_loop.batch_progress"]
    ready, taken = progress["current"]["ready"], steps["current"]["completed"] * micro_batches
    progress["is_last_batch"] = progress["is_last_batch"] and (saved or taken >= ready)
    current = ready if progress["is_last_batch"] else taken
    within = 0 <= ready - current < micro_batches  # else a step had more or fewer when the checkpoint was saved
    total = progress["total"]["ready"] - (ready - current) if within else steps["total"]["completed"] * micro_batches
    for key, batches in {"total": total, "current": current}.items():
        progress[key] |= {"ready": batches, "started": batches, "processed": batches, "completed": max(0, batches - 1)}
    for counts in (loop["epoch_loop.val_loop.batch_progress"][key] for key in ("total", "current")):
        counts |= {"ready": int(not validated), "started": int(not validated), "processed": 0, "completed": 0}
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1  # resuming adds one
    return int(ready - current)


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


def warn_of_dataloader(checkpoint: dict[str, Any], after: int) -> None:
    """Note in a checkpoint how many micro-batches after the step it is saved, if a dataloader's own state is behind them."""
    if after and checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader"):
        checkpoint["micro_batches_after_step"] = after
        rank_zero_warn(f"a checkpoint that no run can resume: it {_AFTER_STEP.format(after)}")


def require_whole_epochs(trainer: Trainer, other_steps: bool, of_dataloader: str | None) -> None:
    """Check that a run that has steps to take goes over each epoch of data that have an end once.

    Args:
        trainer: of the fit that begins.
        other_steps: whether it goes on within an epoch of steps of more or fewer micro-batches.
        of_dataloader: `problem_of_dataloader` of its checkpoint.

    Raises:
        AllRanksSettingError: it does not: `of_dataloader`; `other_steps`, where Lightning miscounts the rest of the epoch; or
            DeepSpeed's engine, which counts the micro-batches of all epochs, would step at others than Lightning.
    """
    batches, window = trainer.num_training_batches, trainer.accumulate_grad_batches
    if of_dataloader is not None:
        raise AllRanksSettingError(f"{trainer.ckpt_path} {of_dataloader}")
    if batches == math.inf:
        return
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


def was_validated(checkpoint: dict[str, Any]) -> bool:
    """Return the `validated` that `set_loop_counters` had when the checkpoint was saved."""
    counts = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]
    return bool(counts["ready"] == counts["completed"])
