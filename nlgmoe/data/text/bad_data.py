"""Policy for unusable data: end the run with its place and the reason, or skip it, count it and report it."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from nlgmoe.validation import RunError

Action = Literal["error", "skip"]

# The order is that of the counts in a cursor, hence in checkpoints: append new kinds at the end.
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


class UnusableError(Exception):
    """A document or file is unusable; the caller adds its place in `BadData.handle`.

    Args:
        kind: one of `KINDS`.
        details: of this case.
    """

    def __init__(self, kind: str, details: str = "") -> None:
        assert kind in KINDS, kind
        super().__init__(kind, details)
        self.kind = kind
        self.message = f"{kind} ({details})" if details else kind


@dataclass
class BadData:
    """Policy for unusable data.

    Args:
        action: "error" ends the run; "skip" leaves out the document, or the rest of a damaged file, and counts it.
        report: gets a line for the first of each kind that is skipped.
        reported: kinds that were reported; may be shared.

    Attributes:
        skipped: count by kind.
    """

    action: Action = "error"
    report: Callable[[str], object] = warnings.warn
    reported: set[str] = field(default_factory=set)
    skipped: Counter[str] = field(default_factory=Counter)

    def handle(self, place: str, error: UnusableError) -> None:
        """Raise or count an error; `place` is its file and line."""
        if self.action == "error":
            raise RunError(f"{place}: {error.message}; repair the data, or set on_bad_data to skip")
        self.skipped[error.kind] += 1
        if error.kind not in self.reported:
            self.reported.add(error.kind)
            self.report(f"{place}: {error.message}; it is skipped, and so is what else is wrong in this way")


def summary(skipped: Mapping[str, int]) -> str:
    """Return the counts by kind in a line; empty if nothing was skipped."""
    return ", ".join(f"{kind}: {skipped[kind]:,}" for kind in KINDS if skipped.get(kind))
