"""A logical stream: a fixed part of a corpus as endless windows, resumed at any cursor.

    files -> documents -> blocks of `shuffle_buffer` documents, each shuffled -> tokens -> windows of T

A stream's documents and their order are a function of its number, the number of streams and the seed. Files and streams
are divided into `gcd(files, streams)` groups; the streams of a group share its files, each reading every n-th document.
Streams have equally many documents, and no two share a file if the files are a multiple of the streams.

Windows are cut as in `packing.py`: every document is closed by the end-of-document token, each token is a target once,
and the first input of all is an end of document.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nlgmoe.data.text.bad_data import KINDS, Action, BadData
from nlgmoe.data.text.documents import read_documents
from nlgmoe.data.text.records import Fields, FileOffset, Record, Shard
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.seeding import derive_seed
from nlgmoe.validation import RunError

BLOCK_LENGTH = 1 << 26  # characters or token ids; a block of books ends early, so that it fits into memory
ENCODED_LENGTH, ENCODED_DOCUMENTS = 1 << 20, 16  # characters and documents that are tokenised at once


class Cursor(NamedTuple):
    """Start of a window, as plain numbers for checkpoints.

    Attributes:
        window: its number in the stream.
        epoch: complete passes over the stream's documents.
        block: number in the epoch of the block in which the window begins.
        file: number in the epoch's order of the file in which the block begins.
        documents, bytes: `FileOffset` in that file at which the block begins.
        document: number in the block's order of the document in which, or right after which, the window begins.
        token: number in that document of the window's first target.
        skipped: counts of unusable data up to the block's end, by `KINDS`.
    """

    window: int = 0
    epoch: int = 0
    block: int = 0
    file: int = 0
    documents: int = 0
    bytes: int = 0
    document: int = 0
    token: int = 0
    skipped: tuple[int, ...] = (0,) * len(KINDS)

    def to_numbers(self) -> list[int]:
        """Return all numbers in a list."""
        return [*self[:-1], *self.skipped]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> "Cursor":
        """Undo `to_numbers`; kinds that came later count 0."""
        plain, skipped = numbers[: len(cls._fields) - 1], numbers[len(cls._fields) - 1 :]
        return cls._make([*plain, (*skipped, *[0] * (len(KINDS) - len(skipped)))])


class Window(NamedTuple):
    """T tokens to train on.

    Attributes:
        inputs: int64 [T].
        targets: int64 [T].
        domain: of most of the targets.
        after: start of the next window.
    """

    inputs: np.ndarray
    targets: np.ndarray
    domain: int
    after: Cursor


@dataclass(frozen=True)
class StreamConfig:
    """Settings that all streams of a corpus share.

    Args:
        files: names or addresses, in a fixed order.
        fields: fields of a record to read.
        domains: names by id; documents of other domains belong to the last one.
        tokenizer: of the tokens.
        num_streams: number of streams.
        shuffle_buffer: documents in a block.
        on_bad_data: policy for unusable data.
        reported: kinds of unusable data that this process has warned of.
    """

    files: Sequence[str]
    fields: Fields
    domains: Sequence[str]
    tokenizer: Tokenizer
    num_streams: int
    shuffle_buffer: int
    on_bad_data: Action
    reported: set[str] = field(default_factory=set)

    def part(self, stream: int) -> tuple[list[str], Shard]:
        """Return the files that a stream reads, and its shard of each."""
        groups = math.gcd(len(self.files), self.num_streams)
        group, index = stream % groups, stream // groups
        return list(self.files[group::groups]), Shard(index, self.num_streams // groups)

    def tokens(self, records: Sequence[Record]) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the tokens of each document, closed by the end-of-document token, int64 [N], and its domain's id."""
        eod = self.tokenizer.eod_id
        for group in _groups(records):
            texts = [record.content for record in group if isinstance(record.content, str)]
            encoded = iter(self.tokenizer.encode_batch(texts) if texts else [])
            for record in group:
                content = next(encoded) if isinstance(record.content, str) else record.content
                ids = np.asarray(content, dtype=np.int64)
                closed = ids if ids.size and ids[-1] == eod else np.append(ids, eod)
                yield closed, self.domain(record)

    def domain(self, record: Record) -> int:
        """Return the id of a document's domain."""
        return self.domains.index(record.domain) if record.domain in self.domains else len(self.domains) - 1


class LogicalStream:
    """The windows of one stream.

    Args:
        config: of all streams.
        stream: its number.
        seq_len: T, in tokens.
        seed: of the order.
    """

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
            for number, (tokens, domain) in enumerate(self._config.tokens(records[first:]), start=first):
                yield tokens, domain, cursor._replace(document=number)
            first = 0

    def _blocks(self, start: Cursor) -> Iterator[tuple[list[Record], Cursor]]:
        """Yield the shuffled documents of each block, and its cursor, from that of `start` on."""
        bad = BadData(self._config.on_bad_data, reported=self._config.reported)
        cursor = start._replace(document=0)
        while True:
            records = self._records(cursor, bad)
            while block := _take(records, self._config.shuffle_buffer):
                if cursor.block == start.block and cursor.epoch == start.epoch and start.window > 0:
                    # This block's unusable data was counted when it was first read.
                    bad.skipped = Counter(dict(zip(KINDS, start.skipped, strict=True)))
                cursor = cursor._replace(skipped=tuple(bad.skipped[kind] for kind in KINDS))
                order = self._permutation("block", len(block), cursor.epoch, cursor.block)
                yield [block[i][1] for i in order], cursor
                file, last = block[-1]
                cursor = cursor._replace(
                    block=cursor.block + 1, file=file, documents=last.after.documents, bytes=last.after.bytes
                )
            if cursor.block == 0:
                raise RunError(
                    f"num_streams={self._config.num_streams} leaves stream {self._stream} no document that can be used; "
                    f"lower it, or use a larger corpus"
                )
            cursor = cursor._replace(epoch=cursor.epoch + 1, block=0, file=0, documents=0, bytes=0)

    def _records(self, cursor: Cursor, bad: BadData) -> Iterator[tuple[int, Record]]:
        """Yield the rest of an epoch's documents, each with its file's index in the epoch's order."""
        files = self._permutation("files", len(self._files), cursor.epoch)
        place = FileOffset(cursor.documents, cursor.bytes)
        for number in range(cursor.file, len(files)):
            path = self._files[files[number]]
            for record in read_documents(path, self._config.fields, bad, self._shard, place):
                yield number, record
            place = FileOffset()

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


def _groups(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Yield batches to tokenise: bounded in memory, few calls."""
    group: list[Record] = []
    length = 0
    for record in records:
        if group and (len(group) == ENCODED_DOCUMENTS or length + len(record.content) > ENCODED_LENGTH):
            yield group
            group, length = [], 0
        group.append(record)
        length += len(record.content)
    if group:
        yield group
