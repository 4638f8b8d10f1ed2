"""A stream: a fixed part of a streamed corpus as endless windows, resumed at any cursor; and samples out of all streams.

    files -> documents -> blocks of `shuffle_buffer` documents, each shuffled -> tokens -> windows of T

A stream's documents and their order are a function of its number, the number of streams and the seed. Files and streams
are divided into `gcd(files, streams)` groups; the streams of a group share its files, each reading every n-th document.
Streams have equally many documents, and no two share a file if the files are a multiple of the streams.

Windows are cut as in `samples.py`: every document is closed by the end-of-document token, each token is a target once,
and the first input of a stream is the end-of-document token.
"""

import math
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from nlgmoe.data.documents import Fields, Record, read_documents
from nlgmoe.data.samples import Sample, TokenSource
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.ranks import gather
from nlgmoe.seeding import derive_seed
from nlgmoe.validation import RunError

BLOCK_LENGTH = 1 << 26  # characters; a block of books ends early, so that it fits into memory


class Cursor(NamedTuple):
    """Start of a window, as plain numbers for checkpoints."""

    window: int = 0  # its number in the stream
    epoch: int = 0  # complete passes over the stream's documents
    block: int = 0  # number in the epoch of the block in which the window begins
    file: int = 0  # number in the epoch's order of the file in which the block begins
    first: int = 0  # number in that file of the block's first document
    document: int = 0  # number in the block's order of the document in which, or right after which, the window begins
    token: int = 0  # number in that document of the window's first target


class Window(NamedTuple):
    """T tokens to train on."""

    inputs: np.ndarray  # int64 [T]
    targets: np.ndarray  # int64 [T]
    domain: int  # of most of the targets
    after: Cursor  # start of the next window


@dataclass(frozen=True)
class StreamConfig:
    """Settings that all streams of a corpus share."""

    files: Sequence[str]  # names or addresses, in a fixed order
    fields: Fields
    domains: Sequence[str]  # names by id; documents of other domains belong to the last one
    tokenizer: Tokenizer
    num_streams: int
    shuffle_buffer: int  # documents in a block

    def part(self, stream: int) -> tuple[list[str], range]:
        """Return the files that a stream reads, and the numbers of the documents that it reads of each."""
        groups = math.gcd(len(self.files), self.num_streams)
        group, index = stream % groups, stream // groups
        return list(self.files[group::groups]), range(index, sys.maxsize, self.num_streams // groups)

    def tokens(self, record: Record) -> np.ndarray:
        """Return the tokens of a document, closed by the end-of-document token, int64 [N]."""
        (ids,) = self.tokenizer.encode_batch([record.content])
        return np.asarray(self.tokenizer.closed(ids), dtype=np.int64)

    def domain(self, record: Record) -> int:
        """Return the id of a document's domain."""
        return self.domains.index(record.domain) if record.domain in self.domains else len(self.domains) - 1


class Stream:
    """The windows of `seq_len` tokens of stream number `stream`, in an order that `seed` determines."""

    def __init__(self, config: StreamConfig, stream: int, seq_len: int, seed: int) -> None:
        self._config = config
        self._stream = stream
        self._seq_len = seq_len
        self._seed = seed
        self._files, self._shard = config.part(stream)

    def windows(self, start: Cursor) -> Iterator[Window]:
        """Yield windows from `start` on, without end. At most one block is read again."""
        cut = start.token
        previous = self._config.tokenizer.eod_id
        targets = np.empty(self._seq_len, dtype=np.int64)
        filled, window, of_domain = 0, start.window, Counter[int]()
        for tokens, domain, cursor in self._documents(start):
            if cut > 0:
                previous = int(tokens[cut - 1])
            while cut < len(tokens):
                taken = min(self._seq_len - filled, len(tokens) - cut)
                targets[filled : filled + taken] = tokens[cut : cut + taken]
                filled, cut = filled + taken, cut + taken
                of_domain[domain] += taken
                if filled == self._seq_len:
                    window += 1
                    inputs = np.concatenate(([previous], targets[:-1]))
                    after = cursor._replace(window=window, token=cut)
                    yield Window(inputs, targets, of_domain.most_common(1)[0][0], after)
                    previous = int(targets[-1])
                    targets = np.empty(self._seq_len, dtype=np.int64)
                    filled, of_domain = 0, Counter[int]()
            cut = 0

    def _documents(self, start: Cursor) -> Iterator[tuple[np.ndarray, int, Cursor]]:
        """Yield tokens, domain and cursor (at token 0) of each document from that of `start` on."""
        first = start.document
        for records, cursor in self._blocks(start):
            for number in range(first, len(records)):
                tokens, domain = self._config.tokens(records[number]), self._config.domain(records[number])
                yield tokens, domain, cursor._replace(document=number)
            first = 0

    def _blocks(self, cursor: Cursor) -> Iterator[tuple[list[Record], Cursor]]:
        """Yield the shuffled documents of each block, and its cursor, from that of `cursor` on."""
        while True:
            records = self._records(cursor)
            while block := _take(records, self._config.shuffle_buffer):
                order = self._permutation("block", len(block), cursor.epoch, cursor.block)
                yield [block[i][1] for i in order], cursor
                file, last = block[-1]
                cursor = cursor._replace(block=cursor.block + 1, file=file, first=last.number + 1)
            if cursor.block == 0:
                problem = f"num_streams={self._config.num_streams} leaves stream {self._stream} no document"
                raise RunError(f"{problem}; lower it, or use a larger corpus")
            cursor = cursor._replace(epoch=cursor.epoch + 1, block=0, file=0, first=0)

    def _records(self, cursor: Cursor) -> Iterator[tuple[int, Record]]:
        """Yield the rest of an epoch's documents, each with its file's index in the epoch's order."""
        files, first = self._permutation("files", len(self._files), cursor.epoch), cursor.first
        for number in range(cursor.file, len(files)):
            path = self._files[files[number]]
            for record in read_documents(path, self._config.fields, self._shard, first):
                yield number, record
            first = 0

    def _permutation(self, purpose: str, length: int, *names: int) -> np.ndarray:
        seed = derive_seed(self._seed, purpose, self._stream, *names)
        return np.random.Generator(np.random.PCG64(seed)).permutation(length)


def _take(records: Iterator[tuple[int, Record]], count: int) -> list[tuple[int, Record]]:
    """Return the next `count` records; fewer if they are long, or at the end."""
    taken: list[tuple[int, Record]] = []
    length = 0
    while len(taken) < count and length < BLOCK_LENGTH and (item := next(records, None)) is not None:
        taken.append(item)
        length += len(item[1].content)
    return taken


class StreamedSource(TokenSource):
    """The windows of all streams in turn, without end: sample i is window `i // S` of stream `i % S`, S the number of streams.

    A process opens the streams of the samples that it reads, and reads each forwards; an earlier sample is read from the
    stream's cursor again.
    """

    has_cursors = True

    def __init__(self, config: StreamConfig, seq_len: int, seed: int) -> None:
        self.seq_len = seq_len
        self._config = config
        self._seed = seed
        self._cursors: dict[int, Cursor] = {}
        self._open: dict[int, tuple[int, Iterator[Window]]] = {}  # stream -> number of its next window, and the rest

    def seek(self, cursors: Sequence[Sequence[int]]) -> None:
        """See `TokenSource`."""
        self._cursors = {stream: Cursor(*numbers) for stream, *numbers in cursors}
        self._open = {}

    def sample(self, index: int) -> Sample:
        """See `TokenSource`."""
        position, stream = divmod(index, self._config.num_streams)
        number, windows = self._open.pop(stream, (math.inf, iter(())))
        if number > position:
            cursor = self._cursors.get(stream, Cursor())
            cursor = cursor if cursor.window <= position else Cursor()
            number = cursor.window
            windows = Stream(self._config, stream, self.seq_len, self._seed).windows(cursor)
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
            cursor=torch.tensor([stream, *window.after]),
        )


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
        """Keep the cursors of the first `samples` pending samples of this rank, which were trained on."""
        while self._pending and samples >= len(self._pending[0]):
            samples -= len(self._pending[0])
            self._keep(self._pending.popleft())

    def discard_pending(self) -> None:
        """Discard pending cursors: their samples will be loaded again."""
        self._pending.clear()

    def load(self, cursors: Sequence[Sequence[int]]) -> None:
        """Restore a checkpoint's cursors."""
        self.discard_pending()
        self._latest = {}
        self._keep(cursors)

    def latest(self) -> list[list[int]]:
        """Return the cursor of each stream of this process, by stream."""
        return [self._latest[stream] for stream in sorted(self._latest)]

    def gather(self) -> list[list[int]]:
        """Return a cursor for each stream of all ranks: a collective."""
        for cursors in gather(self.latest()):
            self._keep(cursors)
        return self.latest()

    def _keep(self, cursors: Sequence[Sequence[int]]) -> None:
        for stream, window, *rest in cursors:
            if stream not in self._latest or self._latest[stream][1] < window:
                self._latest[stream] = [stream, window, *rest]
