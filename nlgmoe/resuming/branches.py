"""Branches of a run: a start may go on from a checkpoint of an earlier start than the last one, and so return to its branch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nlgmoe.files import require_regular


def first_step_of_others(folder: Path, checkpoint: dict[str, Any]) -> int:
    """Return the step from which the tables of a run folder have rows of branches that a checkpoint is not of.

    Args:
        folder: the run folder.
        checkpoint: Lightning's dictionary of what is resumed.

    Returns:
        The checkpoint's step, or an earlier one to which a start went back after the checkpoint's.
    """
    step, start = checkpoint["global_step"], checkpoint.get("start")
    try:
        require_regular(folder / "starts.json", "remove it")
        starts = json.loads((folder / "starts.json").read_text())
        if start is None or starts[0]["run"] != checkpoint.get("run"):
            return int(step)
        return int(min([step, *(one["step"] for one in starts[start + 1 :] if one.get("trained", True))]))
    except (OSError, ValueError, LookupError, TypeError):
        return int(step)
