"""Where training stands in each stream of a `CursorSource`, counted from samples that were trained on."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import distributed


class Cursors:
    """The cursors of a run. Those of loaded batches wait until an optimizer step was taken on the batch."""

    def __init__(self) -> None:
        self._reached: dict[int, list[int]] = {}  # stream -> its whole cursor
        self._waiting: deque[list[list[int]]] = deque()  # of each micro-batch, not trained on yet

    def take(self, batch: dict[str, Any]) -> None:
        """Move the cursors out of a micro-batch that is about to be trained on, if it has any."""
        cursor = batch.pop("cursor", None)
        if cursor is not None:
            self._waiting.append(cursor.tolist())

    def commit(self, samples: int) -> None:
        """The first `samples` of the waiting ones, of this rank, have been trained on."""
        while self._waiting and samples >= len(self._waiting[0]):
            samples -= len(self._waiting[0])
            self._keep(self._waiting.popleft())

    def forget_waiting(self) -> None:
        """What waits will be loaded again."""
        self._waiting.clear()

    def load(self, cursors: Sequence[Sequence[int]]) -> None:
        """Go on from a checkpoint's."""
        self._waiting.clear()
        self._reached = {}
        self._keep(cursors)

    def reached(self) -> list[list[int]]:
        """One of each stream that this process knows of, by stream."""
        return [self._reached[stream] for stream in sorted(self._reached)]

    def of_all_ranks(self) -> list[list[int]]:
        """One of each stream; where there are ranks, all of them have to call this."""
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            found: list[list[list[int]]] = [[] for _ in range(distributed.get_world_size())]
            distributed.all_gather_object(found, self.reached())
            for cursors in found:
                self._keep(cursors)
        return self.reached()

    def _keep(self, cursors: Sequence[Sequence[int]]) -> None:
        for stream, window, *rest in cursors:
            if stream >= 0 and (stream not in self._reached or self._reached[stream][1] < window):
                self._reached[stream] = [stream, window, *rest]
