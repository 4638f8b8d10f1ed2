"""Callbacks that decide by scores or steps, `ModelCheckpoint` and `EarlyStopping`, in a resumed run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_warn

from nlgmoe.checkpoint.folder import read_document


def saves_by_steps(callback: Callback) -> bool:
    """Return whether a callback is a `ModelCheckpoint` that saves after training steps, not after validations."""
    return isinstance(callback, ModelCheckpoint) and (
        callback._every_n_train_steps > 0 or callback._train_time_interval is not None
    )


def metrics_in_name(keeper: ModelCheckpoint) -> list[str]:
    """Return the metrics that a `ModelCheckpoint` writes into file names."""
    return re.findall(r"{([^}:]+)", keeper.filename or "")


def set_saved_step(trainer: Trainer, step: int, missed: Sequence[Callback]) -> None:
    """Make `ModelCheckpoint` save steps after a resumed one that an earlier fit of the trainer has saved.

    The resumed step itself may be validated, and saved, once more, but not in the first micro-batch of the next step, where
    Lightning still counts it: a metric would be judged a second time.

    Args:
        trainer: of the fit.
        step: the resumed one.
        missed: those that had not seen the step.
    """
    for one in trainer.checkpoint_callbacks:
        if isinstance(one, ModelCheckpoint):
            one._last_global_step_saved = step if saves_by_steps(one) and one not in missed else 0
            one._last_checkpoint_saved = ""


def keep_patience(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Replace the saved `EarlyStopping.patience` by the configured one, before the checkpoint is loaded."""
    for one in trainer.early_stopping_callbacks:
        if one is not None and (state := checkpoint.get("callbacks", {}).get(one.state_key)):
            state["patience"] = one.patience


def follow_moved_folder(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Give `ModelCheckpoint` its scores back if its folder was moved: Lightning forgets them where `dirpath` has changed."""
    for one in trainer.checkpoint_callbacks:
        state = checkpoint.get("callbacks", {}).get(one.state_key)
        if not isinstance(one, ModelCheckpoint) or not state or state["dirpath"] is None:
            continue
        old, new = str(state["dirpath"]), str(one.dirpath)
        if old == new or not Path(state["best_model_path"].replace(old, new, 1)).exists():
            continue
        for key in ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = state[key].replace(old, new, 1)
        state["best_k_models"] = {path.replace(old, new, 1): score for path, score in state["best_k_models"].items()}


def keep_own_best(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Let `ModelCheckpoint` hold new scores against its own checkpoints only, and keep no more than `save_top_k` from here on.

    A checkpoint that is gone, as by another branch of the run, does not count. One that was saved again since counts as the
    worst: it does not have the weights of its score, and is to be replaced. Those beyond `save_top_k` stay where they are.
    """
    for one in trainer.checkpoint_callbacks:
        state = checkpoint.get("callbacks", {}).get(one.state_key)
        if not isinstance(one, ModelCheckpoint) or one.monitor is None or not state:
            continue
        if state["dirpath"] != str(one.dirpath):
            continue  # of another run: Lightning does not take them
        scores = state["best_k_models"]
        # Rank 0 decides: others may see a file later, and `ModelCheckpoint` needs the same scores on all.
        saved_at = {path: _saved_at(path) for path in scores} if trainer.is_global_zero else {}
        saved_at = trainer.strategy.broadcast(saved_at)
        gone = [path for path in scores if not saved_at[path]]
        replaced = [path for path in scores if saved_at[path] > checkpoint["saved_at"]]
        worst = torch.tensor(torch.inf if one.mode == "min" else -torch.inf)
        scores = {path: worst if path in replaced else score for path, score in scores.items() if path not in gone}
        kept = sorted(scores, key=lambda path: float(scores[path]), reverse=one.mode == "max")
        kept, surplus = (kept[: one.save_top_k], kept[one.save_top_k :]) if one.save_top_k > 0 else (kept, [])
        name = f"ModelCheckpoint, monitor={one.monitor}:"
        if gone or replaced:
            rank_zero_warn(
                f"{name} {', '.join([*gone, *replaced])} is gone, or was saved again after the checkpoint that is resumed: its "
                "score does not count among the best"
            )
        if surplus:
            rank_zero_warn(
                f"{name} {len(surplus)} checkpoints exceed save_top_k={one.save_top_k}, and stay in {one.dirpath}: "
                f"{', '.join(Path(path).name for path in surplus)}"
            )
        if state["best_k_models"]:
            _set_best(state, {path: score for path, score in scores.items() if path in kept}, one.mode)


def _set_best(state: dict[str, Any], scores: dict[str, torch.Tensor], mode: str) -> None:
    """Set what a `ModelCheckpoint` keeps, and which is the best and the worst of them.

    Lightning names the worst, which the next better one replaces, only once there are `save_top_k`; that may have been lowered.
    """
    best, worst = (min, max) if mode == "min" else (max, min)
    state["best_k_models"] = scores
    state["best_model_path"] = best(scores, key=lambda path: float(scores[path]), default="")
    state["kth_best_model_path"] = worst(scores, key=lambda path: float(scores[path]), default="")
    state["best_model_score"] = scores.get(state["best_model_path"])


def _saved_at(path: str) -> str:
    """Return when a checkpoint was saved; an empty text if there is none any more."""
    try:
        return str(read_document(path)["saved_at"])
    except (ValueError, OSError):
        return ""


def forget_deferred_saves(trainer: Trainer) -> None:
    """Make `ModelCheckpoint` not save after the next validation what it could not save yet, its metric being unknown.

    Before the first step, whose number is a multiple of every interval, it would save a step that is none.
    """
    for one in trainer.checkpoint_callbacks:
        if isinstance(one, ModelCheckpoint):
            one._defer_save_until_validation = False


def monitored(trainer: Trainer) -> dict[str, float]:
    """Return the metrics that callbacks monitor or write into file names; a resumed run begins with them."""
    names: set[str | None] = {one.monitor for one in trainer.early_stopping_callbacks if one is not None}
    for one in trainer.checkpoint_callbacks:
        if isinstance(one, ModelCheckpoint):
            names |= {one.monitor, *metrics_in_name(one)}
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name in names}


def stopped_early(trainer: Trainer) -> EarlyStopping | None:
    """Return the callback that ended the run; None if there is none, or if its patience has been raised since."""
    for one in trainer.early_stopping_callbacks:
        if one is None or one.stopping_reason == EarlyStoppingReason.NOT_STOPPED:
            continue
        if one.stopping_reason != EarlyStoppingReason.PATIENCE_EXHAUSTED or one.wait_count >= one.patience:
            return one
    return None
