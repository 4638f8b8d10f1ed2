"""Progress lines of a build that may take hours, one every ten seconds."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nlgmoe.tools.megatron.build_indexed import Progress

SECONDS = 10.0


class ProgressLines:
    """Prints how far a build is, and how fast, on stderr.

    Args:
        files: how many are read.
    """

    def __init__(self, files: int) -> None:
        self._files = files
        self._first: Progress | None = None
        self._started = self._printed = 0.0

    def report(self, progress: Progress) -> None:
        """Print, if it is time to."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._started, self._printed = progress, now, now
            if progress.documents:
                self.print(f"going on behind {progress.documents:,} documents")
        elif now - self._printed >= SECONDS:
            done, seconds = progress.bytes - self._first.bytes, now - self._started
            file = min(progress.file + 1, self._files)
            self.print(
                f"file {file} of {self._files}: {progress.documents:,} documents, {progress.bytes / 1e6:,.0f} MB, "
                f"{progress.tokens:,} tokens; {done / 1e6 / seconds:,.1f} MB/s"
            )
            self._printed = now

    def print(self, line: str) -> None:
        """Print a line at once."""
        print(line, file=sys.stderr, flush=True)
