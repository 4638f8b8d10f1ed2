"""`ckpt_path`: which checkpoint, or folder of some, it names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from nlgmoe.checkpoint.folder import is_of_run, read_document
from nlgmoe.checkpoint.newest import has_checkpoints, is_checkpoint
from nlgmoe.cli.first_save import step_past_first_save
from nlgmoe.validation import SettingError


def require_checkpoint(path: str | Path) -> None:
    """Check that there is a checkpoint at `ckpt_path`; reading it verifies it.

    Raises:
        ValueError: there is none.
    """
    if is_checkpoint(path):
        read_document(path)
    elif not has_checkpoints(Path(path)):
        raise SettingError(f"no checkpoint at {path}: expected one, or a run's folder with some in it")


def resolve_checkpoint(
    name: Any,
    folder: Path,
    remedy: str,
    may_start: bool,
    places: Sequence[Path] = (),
    keepers: Sequence[ModelCheckpoint] = (),
) -> Any:
    """Replace `last` and `auto` by the run folder, or `auto` by None where a run may start and there is no checkpoint.

    All ranks choose the checkpoint together later (`checkpoint/newest.py`).

    Args:
        name: `ckpt_path` as it was given.
        folder: the run folder.
        remedy: what to do if there is none.
        may_start: whether a new run is the alternative.
        places: where the run saves checkpoints.
        keepers: the run's; one that was killed before its first checkpoint was due is started again.

    Raises:
        ValueError: there is no checkpoint, or the run does not save them in its folder; or `auto` would start a run again
            that has ended or must have saved a checkpoint.
    """
    if name not in ("last", "auto"):
        return name
    for place in places:
        if not is_of_run(place, folder):
            raise ValueError(
                f"ckpt_path={name} looks into trainer.default_root_dir={folder}, but ModelCheckpoint.dirpath={place} is outside: "
                "leave dirpath out (the folder checkpoints may be a link), or give the path of a checkpoint"
            )
    found = has_checkpoints(folder)
    if not found and not (name == "auto" and may_start):
        raise SettingError(f"ckpt_path={name}: there is no checkpoint in {folder}; {remedy}")
    if found:
        return str(folder)
    if (step := step_past_first_save(folder, keepers)) is not None:
        raise ValueError(
            f"ckpt_path={name}: {folder} has logged {step} steps but holds no checkpoint, and the run would start again at "
            "step 0; bring its checkpoints back, or choose another trainer.default_root_dir (a run that was killed before its "
            "first save starts again with the interval of saves that it had)"
        )
    return None
