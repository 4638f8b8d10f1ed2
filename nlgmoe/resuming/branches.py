"""Branches of a run: a start may go on from a checkpoint of an earlier start than the last one, and so return to its branch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlgmoe.files import require_regular


@dataclass(frozen=True)
class Start:
    """A start of a run, as `starts.json` records it.

    Attributes:
        step: at which it began.
        rows: that `metrics.csv` had before; None: unknown.
        parent: index of the start that had saved the checkpoint it resumed; None: the one before.
        trained: it took a step.
        forked: it resumed a checkpoint outside the run folder.
    """

    step: int
    rows: int | None = None
    parent: int | None = None
    trained: bool = True
    forked: bool = False

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Start:
        """Make it of an entry; an older nlgmoe has written fewer values."""
        rows, parent = (None if values.get(name) is None else int(values[name]) for name in ("rows", "parent"))
        forked = os.path.isabs(values.get("checkpoint") or "")
        return Start(int(values["step"]), rows, parent, values.get("trained", True), forked)


def first_step_of_others(later: Sequence[Start], step: int) -> int:
    """Return the step from which the tables of a run folder have rows of branches that a checkpoint is not of.

    Args:
        later: starts after the one that saved the checkpoint.
        step: of the checkpoint.

    Returns:
        `step`, or an earlier one to which one of `later` went back to train.
    """
    return min([step, *(one.step for one in later if one.trained)])


def first_step_left(folder: Path, checkpoint: dict[str, Any]) -> int:
    """Return `first_step_of_others` of what is resumed in a run folder.

    Args:
        folder: the run folder.
        checkpoint: Lightning's dictionary.
    """
    step, start = int(checkpoint["global_step"]), checkpoint.get("start")
    try:
        require_regular(folder / "starts.json", "remove it")
        starts = json.loads((folder / "starts.json").read_text())
        if start is None or starts[0]["run"] != checkpoint.get("run"):
            return step
        return first_step_of_others([Start.from_dict(one) for one in starts[start + 1 :]], step)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return step
