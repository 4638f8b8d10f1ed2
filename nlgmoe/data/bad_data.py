"""Data that cannot be used: it ends the run with its place and the reason, or is skipped, counted and reported."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

Action = Literal["error", "skip"]


class Unusable(Exception):
    """A document cannot be used; whoever knows where it stands passes this to `BadData`.

    Args:
        kind: what is wrong, in the words that are counted under.
        details: of this case.
    """

    def __init__(self, kind: str, details: str = "") -> None:
        super().__init__(kind, details)
        self.kind, self.details = kind, details


@dataclass
class BadData:
    """What becomes of data that cannot be used.

    Args:
        action: "error" ends the run; "skip" leaves the document out, or of a damaged file the rest, and counts it.
        report: gets a line for the first of each kind that is skipped.

    Attributes:
        skipped: how many of each kind.
    """

    action: Action = "error"
    report: Callable[[str], object] = rank_zero_warn
    skipped: Counter[str] = field(default_factory=Counter)

    def found(self, place: str, kind: str, details: str = "") -> None:
        """Deal with one thing that cannot be used, see `Unusable`.

        Args:
            place: file and line.
            kind: what is wrong.
            details: of this case.

        Raises:
            ValueError: the action is "error".
        """
        what = f"{place}: {kind}{f' ({details})' if details else ''}"
        if self.action == "error":
            raise ValueError(f"{what}; repair the data, or set on_bad_data to skip")
        self.skipped[kind] += 1
        if self.skipped[kind] == 1:
            self.report(f"{what}; it is skipped, and so is what else is wrong in this way")


def summary(skipped: dict[str, int]) -> str:
    """Counts by kind in a line; empty if nothing was skipped."""
    return ", ".join(f"{kind}: {count:,}" for kind, count in sorted(skipped.items()))
