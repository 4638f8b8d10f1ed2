"""`nlgmoe verify`: check a checkpoint, and print its contents."""

from __future__ import annotations

from pathlib import Path

from nlgmoe.validation import RunError, SettingError


def verify_checkpoint(checkpoint: str) -> None:
    """Read a whole checkpoint, compare it with its checksums and its model, and print its contents.

    Args:
        checkpoint: the folder, `NAME.ckpt`.
    """
    from nlgmoe.checkpoint.run_checkpoints import (  # these need torch, and the model
        checkpoint_path,
        is_checkpoint,
        saved_steps,
    )
    from nlgmoe.checkpoint.verify import describe, find_problems

    if checkpoint and not Path(checkpoint).exists():
        raise SettingError(f"{checkpoint} does not exist; name a checkpoint")
    if not is_checkpoint(checkpoint) or not Path(checkpoint).is_dir():
        names = ", ".join(
            str(checkpoint_path(Path(checkpoint), step)) for step in saved_steps(Path(checkpoint))[:-4:-1]
        )
        raise SettingError(
            f"{checkpoint} is not a checkpoint" + (f"; it holds {names}" if names else ", and contains none")
        )

    if problems := [problem.replace("\n", " ") for problem in find_problems(checkpoint)]:
        raise RunError("\n".join([*problems, f"{checkpoint} is not valid: use another checkpoint"]))
    print(describe(Path(checkpoint)))
