"""`nlgmoe verify`: whether a checkpoint is whole, and what it holds."""

from __future__ import annotations

from pathlib import Path

from nlgmoe.checkpoint.describe import describe
from nlgmoe.cli.errors import Failures, UsageError


def verify_checkpoint(checkpoint: str) -> None:
    """Read a checkpoint to its last byte, hold it against its checksums and its model, and print what it holds.

    Args:
        checkpoint: the folder, `NAME.ckpt`.

    Raises:
        ValueError: something is missing, unknown or damaged; a line for each.
    """
    from nlgmoe.checkpoint.newest import is_checkpoint, list_checkpoints  # these need torch, and the model
    from nlgmoe.checkpoint.verify import find_problems

    if not is_checkpoint(checkpoint):
        names = ", ".join(str(path) for path in list_checkpoints(Path(checkpoint))[:3])
        raise UsageError(
            f"{checkpoint} is no checkpoint; " + (f"it holds {names}" if names else "there is none in it either")
        )

    if found := [problem.replace("\n", " ") for problem in find_problems(checkpoint)]:
        raise Failures([*found, f"{checkpoint} is not valid: use another checkpoint"])
    print(describe(Path(checkpoint)))
