"""The counters of Lightning's training loop in a checkpoint."""

from __future__ import annotations

from typing import Any


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


def was_validated(checkpoint: dict[str, Any]) -> bool:
    """Return the `validated` that `set_loop_counters` had when the checkpoint was saved."""
    counts = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]
    return bool(counts["ready"] == counts["completed"])
