"""Positions of training in the streams of a `CursorSource`, counted from samples that were trained on."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import distributed


class Cursors:
    """Cursors of a run. Those of loaded batches are pending until an optimizer step was taken on the batch."""

    def __init__(self) -> None:
        self._latest: dict[int, list[int]] = {}  # stream -> its cursor
        self._pending: deque[list[list[int]]] = deque()  # of each micro-batch, not trained on yet

    def take(self, batch: dict[str, Any]) -> None:
        """Remove the cursors from a micro-batch, if it has any, and keep them as pending."""
        cursor = batch.pop("cursor", None)
        if cursor is not None:
            self._pending.append(cursor.tolist())

    def commit(self, samples: int) -> None:
        """Count the first `samples` pending ones of this rank as trained on."""
        while self._pending and samples >= len(self._pending[0]):
            samples -= len(self._pending[0])
            self._keep(self._pending.popleft())

    def discard_pending(self) -> None:
        """Discard pending cursors: their samples will be loaded again."""
        self._pending.clear()

    def load(self, cursors: Sequence[Sequence[int]]) -> None:
        """Restore a checkpoint's cursors."""
        self._pending.clear()
        self._latest = {}
        self._keep(cursors)

    def latest(self) -> list[list[int]]:
        """Return the cursor of each stream of this process, by stream."""
        return [self._latest[stream] for stream in sorted(self._latest)]

    def gather(self) -> list[list[int]]:
        """Return a cursor for each stream of all ranks: a collective."""
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            gathered: list[list[list[int]]] = [[] for _ in range(distributed.get_world_size())]
            distributed.all_gather_object(gathered, self.latest())
            for cursors in gathered:
                self._keep(cursors)
        return self.latest()

    def _keep(self, cursors: Sequence[Sequence[int]]) -> None:
        for stream, window, *rest in cursors:
            if stream >= 0 and (stream not in self._latest or self._latest[stream][1] < window):
                self._latest[stream] = [stream, window, *rest]
