"""The checkpoints of a run folder, `checkpoints/step-N.ckpt`: their names, and the newest valid one.

`checkpoints/last.ckpt` and `best.ckpt` are links to two of them. A step is written once and never replaced
(`run/trainer.py`), so the newest checkpoint is the one with the highest number.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from nlgmoe.checkpoint.reading import KINDS, Checkpoint
from nlgmoe.checkpoint.verify import gather_problems
from nlgmoe.ranks import AllRanksError, of_rank_zero, raise_on_all_ranks
from nlgmoe.validation import SettingError, require

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d+)\.ckpt")


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return run_folder / FOLDER / f"step-{step}.ckpt"


def saved_steps(run_folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, valid or not, in ascending order."""
    try:
        names = os.listdir(run_folder / FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def set_link(run_folder: Path, name: str, step: int | None) -> None:
    """Make `checkpoints/NAME.ckpt` a link to a step's checkpoint; None removes it."""
    link = run_folder / FOLDER / f"{name}.ckpt"
    if step is None:
        link.unlink(missing_ok=True)
        return
    new = link.with_name(f".{name}.ckpt.link")
    new.unlink(missing_ok=True)
    new.symlink_to(checkpoint_path(run_folder, step).name)
    new.replace(link)


def is_checkpoint(path: str | Path) -> bool:
    """Return True if `path` names one checkpoint, False if it is a run folder."""
    require(str(path) != "", "the name of a checkpoint or run folder is empty; give one")
    path = Path(path)
    return path.suffix == ".ckpt" or (path / "checkpoint.json").exists() or not path.is_dir()


def choose_checkpoint(path: str | Path, kinds: Collection[str] = KINDS) -> Checkpoint:
    """Return the checkpoint `path`, or the newest of a run folder whose files of these kinds are valid. A collective.

    What is listed in the folder, and where a link points, is rank 0's view alone: a running `fit` may change both. Ranks verify
    a checkpoint together, each a share of the files, so that all raise the same error.
    """
    path = Path(path)
    checkpoint_or_steps = of_rank_zero(Checkpoint(path).path if is_checkpoint(path) else saved_steps(path))
    if isinstance(checkpoint_or_steps, Path):
        checkpoint = Checkpoint(checkpoint_or_steps)
        with raise_on_all_ranks():
            _ = checkpoint.document  # a SettingError if there is no checkpoint
        if problems := gather_problems(checkpoint, kinds):
            raise AllRanksError(f"{_summary(problems)}; use another checkpoint")
        return checkpoint
    skipped = []
    for step in reversed(checkpoint_or_steps):
        checkpoint = Checkpoint(checkpoint_path(path, step))
        problems = gather_problems(checkpoint, kinds)
        if not problems:
            rank_zero_info(f"newest checkpoint: {checkpoint.path}")
            return checkpoint
        rank_zero_warn(f"skipping a checkpoint that cannot be used: {_summary(problems)}")
        skipped.append(_summary(problems))
    if skipped:
        more = f"; and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        raise AllRanksError(f"no valid checkpoint in {path} ({skipped[0]}{more}); start a new run in another folder")
    remedy = "name a checkpoint, or the folder of a run"
    if (path / "config.json").exists():  # `nlgmoe export` has written it
        remedy = "it is a folder for transformers; make a checkpoint of it with nlgmoe import"
    raise SettingError(f"no checkpoint in {path}: {remedy}")


def find_checkpoint(path: str | Path | Checkpoint) -> Checkpoint:
    """Return the checkpoint `path`, or the newest of a run folder, with valid weights, to read these. A collective.

    One that this function has returned is not read again.
    """
    return path if isinstance(path, Checkpoint) else choose_checkpoint(path, ("model",))


def _summary(problems: list[str]) -> str:
    more = f" (and {len(problems) - 1} more problems: nlgmoe verify lists them)" if len(problems) > 1 else ""
    return problems[0] + more
