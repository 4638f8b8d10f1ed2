"""The documents of one file, one after the other: JSON lines (plain, .gz or .zst) and Parquet, in flat memory.

A file is read from front to back, from its beginning or from any `FileOffset` in it, and nothing of it is kept. Decompression
is pyarrow's, for .gz and .zst alike: it notices a stream that ends too early, which zstandard's own reader takes for the
end of the file.
"""

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from fsspec.core import url_to_fs

from nlgmoe.data.text.bad_data import BadData, Unusable
from nlgmoe.data.text.parquet import read_parquet
from nlgmoe.data.text.records import Fields, FileOffset, Record, Shard, check, decode, too_long

JSON_LINES = (".jsonl", ".json", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PIECE_BYTES = 1 << 16  # read at a time; in front of the place where a file is cut off, as much is lost
WHOLE, BEGINNING = Shard(), FileOffset()


def read_documents(
    path: str | Path, fields: Fields, bad: BadData, shard: Shard = WHOLE, start: FileOffset = BEGINNING
) -> Iterator[Record]:
    """Documents of a file, in its order.

    Args:
        path: a local file, or an address that fsspec opens (`hf://datasets/...`); `is_readable` by its ending.
        fields: what is read of each record.
        bad: what becomes of documents and files that cannot be used.
        shard: the documents that are wanted; the others are neither parsed nor checked.
        start: where to begin: `Record.after` of some document of this file.

    Raises:
        ValueError: something cannot be used and `bad` says "error", or a disk or network fails; names file and line, and
            what is wrong.
    """
    assert is_readable(path), path
    read = read_parquet if str(path).endswith(".parquet") else _read_lines
    place, kind, details, number = str(path), "", "", start.documents
    try:
        file_system, name = url_to_fs(str(path))
        with file_system.open(name, "rb") as opened:
            for record in read(opened, str(path), fields, bad, shard, start):
                number = record.number + 1
                yield record
    except GeneratorExit:  # at the end of the process the classes below are gone
        raise
    except Unusable as what:
        kind, details = what.kind, what.details
    except FileNotFoundError:
        kind = "missing file"
    except (OSError, pa.ArrowException) as error:
        place, details = f"{path}, behind document {number:,}", " ".join(str(error).split())
        if not _is_of_the_data(error):
            raise ValueError(
                f"{place}: cannot be read ({details}); once it can be, go on with --ckpt_path last"
            ) from error
        kind = "file cut off" if "Truncated" in details else "damaged file"
    # Of those who share a file, one counts what is wrong with it.
    if kind and (shard.index == 0 or bad.action == "error"):
        bad.found(place, kind, details)


def _is_of_the_data(error: Exception) -> bool:
    """Whether pyarrow complains of what it has read; else a disk or a network fails, which is nothing to skip."""
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def is_readable(path: str | Path) -> bool:
    """Whether a file's name ends as one that `read_documents` knows."""
    name = str(path)
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return name.endswith(JSON_LINES) or str(path).endswith(".parquet")


def _read_lines(
    opened: Any, path: str, fields: Fields, bad: BadData, shard: Shard, start: FileOffset
) -> Iterator[Record]:
    lines = _at(start.bytes, opened, COMPRESSIONS.get(Path(path).suffix))
    number, position = start.documents, start.bytes
    while line := lines.readline(fields.max_bytes + 1):
        length = len(line)
        whole = length <= fields.max_bytes or line.endswith(b"\n")
        while not (whole or line.endswith(b"\n")) and (line := lines.readline(PIECE_BYTES)):
            length += len(line)  # a document too long is passed over, not held
        position += length
        if number in shard:
            try:
                if not whole:
                    raise too_long(length - line.endswith(b"\n"), fields)
                content, domain = _parse(line.removeprefix(codecs.BOM_UTF8), fields)  # some editors put it in front
                yield Record(number, content, domain, FileOffset(number + 1, position))
            except Unusable as what:
                bad.found(f"{path}, line {number + 1:,}", what.kind, what.details)
        number += 1
    if number == 0:
        raise Unusable("empty file")


def _parse(line: bytes, fields: Fields) -> tuple[Any, str | None]:
    """Content and domain of a line of JSON."""
    try:
        record = json.loads(decode(line.rstrip(b"\n"), fields))
    except (ValueError, RecursionError) as error:
        raise Unusable("not JSON", str(error)) from error
    domain = None if fields.domain is None else _look_up(record, fields.domain)
    return check(_look_up(record, fields.content), fields), None if domain is None else str(domain)


def _look_up(record: Any, name: str) -> Any:
    for part in name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def _at(position: int, opened: Any, compression: str | None) -> IO[bytes]:
    """The file's content from a byte on. What is compressed is read up to there: it cannot be entered in the middle."""
    if compression is None:
        opened.seek(position)
        return io.BufferedReader(_Pieces(opened), PIECE_BYTES)
    lines = io.BufferedReader(
        _Pieces(pa.CompressedInputStream(pa.PythonFile(opened, mode="r"), compression)), PIECE_BYTES
    )
    while position > 0 and (passed := len(lines.read(min(position, PIECE_BYTES)))):
        position -= passed
    return lines


class _Pieces(io.RawIOBase):
    """A stream as Python's buffers want it; those ask for whole multiples of their size, from the beginning on.

    The pieces therefore do not depend on where reading begins, nor does the place at which a damaged file ends.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As of any raw stream; raises OSError where the file is damaged or cut off."""
        piece = self._stream.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)
