"""Data that cannot be used: it ends the run with its place and the reason, or is skipped, counted and reported."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Action = Literal["error", "skip"]

# Their order is that of the counts in a cursor, and so in checkpoints: new ones go to the end.
KINDS = (
    "missing file",
    "empty file",
    "file cut off",
    "damaged file",
    "no such column",
    "no such field",
    "not UTF-8",
    "not JSON",
    "not text",
    "not token ids",
    "empty document",
    "document too long",
    "token ids of another tokenizer",
)


class Unusable(Exception):
    """A document or file cannot be used; whoever knows where it stands passes this to `BadData`.

    Args:
        kind: what is wrong, one of `KINDS`.
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
        reported: kinds that it has got one for; may be shared.

    Attributes:
        skipped: how many of each kind.
    """

    action: Action = "error"
    report: Callable[[str], object] = warnings.warn
    reported: set[str] = field(default_factory=set)
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
        assert kind in KINDS, kind
        what = f"{place}: {kind}{f' ({details})' if details else ''}"
        if self.action == "error":
            raise ValueError(f"{what}; repair the data, or set on_bad_data to skip")
        self.skipped[kind] += 1
        if kind not in self.reported:
            self.reported.add(kind)
            self.report(f"{what}; it is skipped, and so is what else is wrong in this way")


def summary(skipped: Mapping[str, int]) -> str:
    """Counts by kind in a line; empty if nothing was skipped."""
    return ", ".join(f"{kind}: {skipped[kind]:,}" for kind in KINDS if skipped.get(kind))
