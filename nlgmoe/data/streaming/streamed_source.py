"""Training samples out of logical streams: sample i is window `i // S` of stream `i % S`, S the number of streams."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from nlgmoe.data.sources import Sample
from nlgmoe.data.streaming.logical_stream import Cursor, LogicalStream, StreamConfig, Window
from nlgmoe.data.text.bad_data import KINDS, summary


class StreamedSource:
    """The windows of all streams in turn, without end.

    A process opens the streams of the samples that it reads, and reads each forwards; an earlier sample is read from the
    stream's cursor again.

    Args:
        config: of the streams.
        seq_len: T, in tokens.
        seed: of the order.
    """

    def __init__(self, config: StreamConfig, seq_len: int, seed: int) -> None:
        self.seq_len = seq_len
        self.cursor_length = 1 + len(Cursor().to_numbers())
        self._config = config
        self._seed = seed
        self._cursors: dict[int, Cursor] = {}
        self._open: dict[int, tuple[int, Iterator[Window]]] = {}  # stream -> number of its next window, and the rest

    def seek(self, cursors: Sequence[Sequence[int]]) -> None:
        """See `CursorSource`."""
        self._cursors = {stream: Cursor.from_numbers(numbers) for stream, *numbers in cursors}
        self._open = {}

    def reading_warning(self, micro_batch_size: int, world_size: int, num_workers: int) -> str | None:
        """See `CursorSource`."""
        streams, processes = self._config.num_streams, world_size * max(1, num_workers)
        times = reads_per_stream(streams, micro_batch_size, processes)
        if times == 1:
            return None
        return (
            f"num_streams={streams} has every stream read and tokenised by {times:g} processes on average; a multiple of "
            f"{processes * micro_batch_size} (micro_batch_size x ranks x workers), set before a run begins, has it read once"
        )

    def skipped_summary(self, cursors: Sequence[Sequence[int]]) -> str | None:
        """See `CursorSource`: what was skipped."""
        skipped = Counter[str]()
        for _, *numbers in cursors:
            skipped.update(dict(zip(KINDS, Cursor.from_numbers(numbers).skipped, strict=True)))
        return f"data that could not be used was skipped: {summary(skipped)}" if skipped.total() else None

    def sample(self, index: int) -> Sample:
        """See `TokenSource`."""
        position, stream = divmod(index, self._config.num_streams)
        number, windows = self._open.pop(stream, (math.inf, iter(())))
        if number > position:
            cursor = self._cursors.get(stream, Cursor())
            cursor = cursor if cursor.window <= position else Cursor()
            number = cursor.window
            windows = LogicalStream(self._config, stream, self.seq_len, self._seed).windows(cursor)
        while number < position:
            next(windows)
            number += 1
        window = next(windows)
        self._open[stream] = (position + 1, windows)
        return Sample(
            tokens=torch.from_numpy(window.inputs),
            targets=torch.from_numpy(window.targets),
            token_mask=torch.ones(self.seq_len, dtype=torch.bool),
            domain=torch.tensor(window.domain),
            cursor=torch.tensor([stream, *window.after.to_numbers()]),
        )


def reads_per_stream(num_streams: int, micro_batch_size: int, processes: int) -> float:
    """Return the mean number of processes that read a stream, if each loads `micro_batch_size` samples at a time.

    Of P processes, the p-th loads the samples from `(p + P m) B` on, for every m (workers take their rank's micro-batches
    in turn). Modulo the number of streams S, these are `S / q * min(B, q)` streams with `q = gcd(P B, S)`.
    """
    period = math.gcd(processes * micro_batch_size, num_streams)
    return processes * min(micro_batch_size, period) / period
