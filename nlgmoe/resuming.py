"""Resume a run from a checkpoint: check that it belongs to the run, and set the counters of Lightning's loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from nlgmoe.batch import TracksSamples
from nlgmoe.checkpoint.agreement import AllRanksError
from nlgmoe.checkpoint.folder import REMEDY
from nlgmoe.config import FREE_IN_EVALUATION, GPTConfig
from nlgmoe.validation import SettingError


def check_same_run(checkpoint: dict[str, Any], config: GPTConfig, seed: int | None, path: Any) -> None:
    """Check that a checkpoint is of this model and, in training, of this run.

    Args:
        checkpoint: Lightning's dictionary.
        config: of this model.
        seed: of this run; None in evaluation, which ignores settings that only affect training.
        path: of the checkpoint, for messages.

    Raises:
        ValueError: a setting differs, which the message names, or the checkpoint to resume holds weights only.
    """
    resumes = seed is not None
    if resumes and "lr_schedulers" not in checkpoint:  # `ModelCheckpoint(save_weights_only=True)`
        raise SettingError(
            f"{path} holds weights only: start a new run from it with model.warm_start.checkpoint={path}"
        )
    ignored = frozenset() if resumes else FREE_IN_EVALUATION
    if not resumes and config.moe is not None and config.moe.router is not None:
        ignored |= config.moe.router.free_in_evaluation
    saved = GPTConfig.from_dict(checkpoint["model_config"]).to_dict()  # fields that it lacks get their defaults
    if different := differences(saved, config.to_dict(), ignore=ignored):
        raise SettingError(
            f"the checkpoint's model differs from model.config: {', '.join(different)}; set model.config as the run had it"
        )
    if resumes and checkpoint["seed"] != seed:
        raise SettingError(f"the checkpoint's run has model.seed {checkpoint['seed']}, not {seed}; set it to resume")


def check_state(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Check that saved state has the types of this run's, and that its numbers can be: else a later step would fail.

    Args:
        checkpoint: Lightning's dictionary.
        trainer: of the fit; callbacks of nlgmoe and Lightning are checked.

    Raises:
        ValueError: a value has another type, is a count below 0, or is not finite.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    ours = [one for one in callbacks if type(one).__module__.split(".")[0] in ("nlgmoe", "lightning")]
    metrics = dict.fromkeys(names, math.nan) if isinstance(names := checkpoint.get("monitored"), dict) else {}
    where = f"{trainer.ckpt_path}: "
    # A time may start as the integer 0.
    _check_types(checkpoint, {"callbacks": {one.state_key: one.state_dict() for one in ours}}, where, Real)
    counts = {
        "validation_due": False,
        "validation_unseen": False,
        "step_unseen": False,
        "monitored": metrics,
        "tokens_seen": 0,
        "non_finite": {"skipped": 0, "in_a_row": 0},
        "lr_schedulers": [{"_step_count": 0, "last_epoch": 0}],
    }
    if isinstance(data := getattr(trainer, "datamodule", None), TracksSamples):
        counts[type(data).__qualname__] = {"samples_consumed": 0}
    if "loops" in checkpoint:
        loops = ("fit_loop", "validate_loop", "test_loop", "predict_loop")
        counts["loops"] = {name: getattr(trainer, name).state_dict() for name in loops}
    _check_types(checkpoint, counts, where, int)


def _check_types(saved: Any, current: Any, where: str, integer: type) -> None:
    """Compare saved state with this run's; where that has an integer, the saved value is of type `integer`."""
    kinds = {bool: bool, int: integer, float: Real, str: str, dict: dict, list: list, tuple: list | tuple}
    kind: Any = next((kind for one, kind in kinds.items() if isinstance(current, one)), object)
    if not isinstance(saved, kind):
        raise ValueError(f"{where.rstrip('/')} is {saved!r}, not of type {type(current).__name__}; {REMEDY}")
    if isinstance(current, int) and saved < 0 <= current:
        raise ValueError(f"{where.rstrip('/')} is {saved}, a count below 0; {REMEDY}")
    if isinstance(current, float) and math.isfinite(current) and not math.isfinite(saved):
        raise ValueError(f"{where.rstrip('/')} is {saved}, not finite; {REMEDY}")
    for name in saved.keys() & current.keys() if isinstance(current, dict) else ():
        _check_types(saved[name], current[name], f"{where}{name}/", integer)
    for index, item in enumerate(saved if isinstance(current, list) else ()):
        # Lists that grow hold numbers, None for NaN, and lists and dictionaries of them.
        known = current[index] if index < len(current) else 0.0 if isinstance(item, str) else item
        _check_types(item, known, f"{where}{index}/", integer)


def check_new_run(trainer: Trainer, tokens: int) -> None:
    """Check that a run that resumes nothing begins at the beginning.

    Args:
        trainer: of the fit that begins.
        tokens: that its module has seen.

    Raises:
        AllRanksError: trainer, module or data are those of an earlier run.
    """
    data = getattr(trainer, "datamodule", None)
    samples = data.samples_consumed if isinstance(data, TracksSamples) else 0
    if trainer.ckpt_path is None and (trainer.global_step or tokens or samples):
        raise AllRanksError(
            f"a new run cannot begin with a trainer at step {trainer.global_step}, a module that has seen {tokens} tokens or "
            f"data at sample {samples}: make all anew, or resume the earlier run with trainer.fit(..., ckpt_path=CHECKPOINT)"
        )


def set_loop_counters(checkpoint: dict[str, Any], micro_batches: int, validated: bool) -> None:
    """Set Lightning's loops to the last optimizer step, before or after the validation of that step.

    The training loop gets its state in `on_train_batch_end` of the step's last micro-batch, where Lightning's own checkpoints are
    saved: that batch is processed but not yet completed. Lightning restarts a validation that is due at that step if one batch is
    ready and none processed.

    Args:
        checkpoint: Lightning's dictionary, before saving or after loading.
        micro_batches: accumulated micro-batches of a step in this run.
        validated: true if a validation was completed at this step.
    """
    loop, step = checkpoint["loops"]["fit_loop"], checkpoint["global_step"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    # Of this epoch, and of all, which data or a trainer in code may have. An epoch's last step may have fewer micro-batches.
    progress = loop["epoch_loop.batch_progress"]
    ready, taken = progress["current"]["ready"], steps["current"]["completed"] * micro_batches
    progress["is_last_batch"] = progress["is_last_batch"] and taken >= ready
    current = ready if progress["is_last_batch"] else taken
    within = 0 <= ready - current < micro_batches  # else a step had more or fewer when the checkpoint was saved
    total = progress["total"]["ready"] - (ready - current) if within else steps["total"]["completed"] * micro_batches
    for key, batches in {"total": total, "current": current}.items():
        progress[key] |= {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
    for counts in (loop["epoch_loop.val_loop.batch_progress"][key] for key in ("total", "current")):
        counts |= {"ready": int(not validated), "started": int(not validated), "processed": 0, "completed": 0}
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1  # resuming adds one


def was_validated(checkpoint: dict[str, Any]) -> bool:
    """Return the `validated` that `set_loop_counters` had when the checkpoint was saved."""
    counts = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]
    return bool(counts["ready"] == counts["completed"])


def keepers_behind_writer(checkpoint: dict[str, Any], trainer: Trainer) -> list[ModelCheckpoint]:
    """Return the `ModelCheckpoint` that come after the one that wrote a checkpoint; none if no one of the run has.

    They save one after the other, each with its own choice in its checkpoint already.

    Args:
        checkpoint: Lightning's dictionary, of the run that is resumed.
        trainer: of the fit.
    """
    keepers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    written = Path(checkpoint["path"]).parts[-2:]  # the run folder may have been moved
    for index, one in enumerate(keepers):
        state = checkpoint.get("callbacks", {}).get(one.state_key, {})
        paths = [*state.get("best_k_models", ()), state.get("best_model_path", ""), state.get("last_model_path", "")]
        if written in [Path(path).parts[-2:] for path in paths]:
            return keepers[index + 1 :]
    return []


def missed_keepers(checkpoint: dict[str, Any], trainer: Trainer) -> list[ModelCheckpoint]:
    """Return the `ModelCheckpoint` that had not seen the validation after which another one saved a checkpoint."""
    behind = keepers_behind_writer(checkpoint, trainer) if checkpoint.get("validation_unseen") else []
    return [one for one in behind if not saves_by_steps(one)]


def saves_by_steps(keeper: ModelCheckpoint) -> bool:
    """Return whether a `ModelCheckpoint` saves after training steps, not after validations."""
    return keeper._every_n_train_steps > 0 or keeper._train_time_interval is not None


def validate_now(trainer: Trainer, again: bool, missed: Sequence[Any] = ()) -> None:
    """Validate during a fit, as the training loop does, if validation is enabled.

    Args:
        trainer: of the fit.
        again: true if the callbacks that decide by scores have counted this validation already.
        missed: those of them that have not.
    """
    if trainer.enable_validation:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        # A `ModelCheckpoint` would delete its worst checkpoint to make room for one that it has.
        counted = [
            one
            for one in callbacks
            if isinstance(one, EarlyStopping) or (isinstance(one, ModelCheckpoint) and one.best_model_path)
        ]
        idle = [one for one in counted if again and one not in missed]
        for (
            one
        ) in idle:  # they stay in the trainer's list: a checkpoint that another one saves here has their states too
            vars(one)["on_validation_end"] = _do_nothing
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.run()
        finally:
            for one in idle:
                del vars(one)["on_validation_end"]
        trainer.training = True


def _do_nothing(*_: Any) -> None:
    pass


def keep_patience(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Replace the saved `EarlyStopping.patience` by the configured one, before the checkpoint is loaded."""
    for one in trainer.early_stopping_callbacks:
        if one is not None and (state := checkpoint.get("callbacks", {}).get(one.state_key)):
            state["patience"] = one.patience


def forget_saves(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Make `ModelCheckpoint` save steps after the resumed one that an earlier fit of the trainer has saved.

    The resumed step itself may be validated, and saved, once more; in the first micro-batch of the next step, where Lightning
    still counts it, only by those that had not seen it: others would judge its metric a second time.

    Args:
        checkpoint: Lightning's dictionary, of the run that is resumed.
        trainer: of the fit.
    """
    unseen = keepers_behind_writer(checkpoint, trainer) if checkpoint.get("step_unseen") else []
    for one in trainer.checkpoint_callbacks:
        if isinstance(one, ModelCheckpoint):
            seen = saves_by_steps(one) and one not in unseen
            one._last_global_step_saved = checkpoint["global_step"] if seen else 0
            one._last_checkpoint_saved = ""


def forget_deferred_saves(trainer: Trainer) -> None:
    """Make `ModelCheckpoint` not save after the next validation what it could not save yet, its metric being unknown.

    Before the first step, whose number is a multiple of every interval, it would save a step that is none.
    """
    for one in trainer.checkpoint_callbacks:
        if isinstance(one, ModelCheckpoint):
            one._defer_save_until_validation = False


def monitored(trainer: Trainer) -> dict[str, float]:
    """Return the training metrics that callbacks monitor, which they read too if a resumed run begins with a validation."""
    keepers: list[Any] = [*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks]
    monitors = {getattr(one, "monitor", None) for one in keepers}
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name in monitors and not name.startswith("val/")
    }


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


def reached_end(trainer: Trainer, max_steps: int | None, tokens: int, train_tokens: int | None) -> str | None:
    """Return which end a run stands at when it begins or resumes, and the remedy; None: it goes on.

    Args:
        trainer: of the fit.
        max_steps: that a resumed run has taken already; None: fewer.
        tokens: that the run has seen.
        train_tokens: at which it ends; None: never.
    """
    if max_steps is not None:
        return f"it has taken trainer.max_steps={max_steps}; to go on, raise it"
    if train_tokens is not None and tokens >= train_tokens:
        return (
            f"{tokens} tokens of train_tokens={train_tokens}; to go on, raise model.train_tokens and "
            "model.schedule.decay_tokens"
        )
    if trainer.ckpt_path is not None:
        for one in trainer.callbacks:  # type: ignore[attr-defined]
            # A timer looks before DeepSpeed's strategy loads its state.
            if isinstance(one, Timer) and one._duration is not None:
                one._check_time_remaining(trainer)
                if trainer.should_stop:
                    return "trainer.max_time is over; to go on, raise it"
    stopper = stopped_early(trainer)
    if stopper is not None and trainer.ckpt_path is not None:
        return (
            f"{type(stopper).__name__}, monitor={stopper.monitor}, ended it at step {trainer.global_step}; to go on, "
            "raise its patience if that ran out, or remove it from trainer.callbacks"
        )
    return None


def stopped_early(trainer: Trainer) -> EarlyStopping | None:
    """Return the callback that ended the run; None if there is none, or if its patience has been raised since."""
    for one in trainer.early_stopping_callbacks:
        if one is None or one.stopping_reason == EarlyStoppingReason.NOT_STOPPED:
            continue
        if one.stopping_reason != EarlyStoppingReason.PATIENCE_EXHAUSTED or one.wait_count >= one.patience:
            return one
    return None


def differences(
    saved: dict[str, Any], current: dict[str, Any], prefix: str = "", ignore: frozenset[str] = frozenset()
) -> list[str]:
    """Return `field saved -> current` for every field that differs; nested fields by path, without those in `ignore`."""
    found = []
    for name in sorted((saved.keys() | current.keys()) - ignore):
        old, new = saved.get(name), current.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.", ignore)
        elif old != new:
            found.append(f"{prefix}{name} {old} -> {new}")
    return found
