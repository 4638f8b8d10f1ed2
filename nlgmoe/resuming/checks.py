"""Check that a checkpoint is of the model and run that resumes it."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Timer

from nlgmoe.batch import HasTokenizer, TracksSamples
from nlgmoe.checkpoint.agreement import AllRanksError
from nlgmoe.checkpoint.folder import REMEDY
from nlgmoe.checkpoint.warm_start import has_same_ids
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


def check_tokenizer(checkpoint: dict[str, Any], data: Any) -> None:
    """Check that a checkpoint without state of the data module has its tokenizer; else the module compares it itself.

    Args:
        checkpoint: Lightning's dictionary, such as one that was imported.
        data: the data module.

    Raises:
        ValueError: it has another one.
    """
    if type(data).__qualname__ in checkpoint or not isinstance(data, HasTokenizer):
        return
    if not has_same_ids(data.tokenizer_json(), checkpoint["path"]):
        raise ValueError(
            f"{checkpoint['path']} has another tokenizer than data.tokenizer; set it to that of the checkpoint"
        )


def check_state(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Check that saved state has the types of this run's, and that its numbers can be: else a later step would fail.

    Args:
        checkpoint: Lightning's dictionary.
        trainer: of the fit; callbacks of nlgmoe and Lightning are checked.

    Raises:
        ValueError: a value has another type, is a count below 0, or is not finite.
    """
    ours = _known_callbacks(trainer)
    metrics = dict.fromkeys(names, math.nan) if isinstance(names := checkpoint.get("monitored"), dict) else {}
    where = f"{trainer.ckpt_path}: "
    states = {one.state_key: one.state_dict() for one in ours}
    for one in ours:
        if isinstance(one, Timer):  # it reads this time alone; during a validation that of validations is below 0
            states[one.state_key] = {"time_elapsed": {"train": 0.0}}
    _check_types(checkpoint, {"callbacks": states}, where, Real)  # a time may start as the integer 0
    counts = {
        "validation_due": False,
        "unseen": {"on_train_batch_end": {}, "on_validation_end": {}},
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


def keep_states_of_fit(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Remove states of callbacks from a checkpoint that is evaluated: a best score, or a sum, is that of the trainer's fit."""
    for one in _known_callbacks(trainer):
        checkpoint.get("callbacks", {}).pop(one.state_key, None)


def _known_callbacks(trainer: Trainer) -> list[Any]:
    """Return the callbacks of nlgmoe and Lightning."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [one for one in callbacks if type(one).__module__.split(".")[0] in ("nlgmoe", "lightning")]


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
