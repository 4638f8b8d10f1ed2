"""Documents of a file in order, from any `FileOffset`, in constant memory: JSON lines, Parquet, plain text.

JSON lines and plain text may be compressed (.gz, .zst).

pyarrow decompresses: it reports a stream that ends too early, which zstandard's reader takes for the end of
the file. Its own JSON reader has neither line numbers nor byte offsets.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from nlgmoe.data.text.bad_data import BadData, UnusableError
from nlgmoe.data.text.records import Fields, FileOffset, Record, Shard, parse, too_long
from nlgmoe.validation import RunError

JSON_LINES = (".jsonl", ".json", ".ndjson")
PLAIN_TEXT = (".txt", ".md")  # one document a file, unless `Fields.text_bytes` is set
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PIECE_BYTES = 1 << 16  # decompressed at a time; as much is lost before the end of a file that is cut off
ROWS = 64  # of Parquet, decoded at a time
WHOLE, BEGINNING = Shard(), FileOffset()


def read_documents(
    path: str | Path, fields: Fields, bad: BadData, shard: Shard = WHOLE, start: FileOffset = BEGINNING
) -> Iterator[Record]:
    """Yield the documents of a file.

    Args:
        path: a local file, or an address that fsspec opens (`hf://datasets/...`); `has_records` or `is_plain_text` by its ending.
        fields: of each record that are read.
        bad: policy for unusable documents and files.
        shard: the documents to yield; others are neither parsed nor checked.
        start: `Record.after` of a document of this file.
    """
    assert has_records(path) or is_plain_text(path), path
    read = _read_text if is_plain_text(path) else _read_parquet if str(path).endswith(".parquet") else _read_lines
    place, number = str(path), start.documents
    try:
        file_system, name = url_to_fs(place)
        with file_system.open(name, "rb") as opened:
            for record in read(opened, place, fields, bad, shard, start):
                number = record.number + 1
                yield record
        return
    except GeneratorExit:  # when the interpreter exits, the classes below no longer exist
        raise
    except UnusableError as unusable:
        error = unusable
    except FileNotFoundError:
        error = UnusableError("missing file")
    except (OSError, pa.ArrowException) as failure:
        place, details = f"{place}, behind document {number:,}", " ".join(str(failure).split())
        # Decompression fails without an errno; else a disk or a network fails, which is nothing to skip.
        if not isinstance(failure, pa.ArrowException) and (type(failure) is not OSError or failure.errno is not None):
            raise RunError(
                f"{place}: cannot be read ({details}); once it can be, run this again, a training with --ckpt_path last"
            ) from failure
        error = UnusableError("file cut off" if "Truncated" in details else "damaged file", details)
    if shard.index == 0 or bad.action == "error":  # one of a file's readers counts it
        bad.handle(place, error)


def has_records(path: str | Path) -> bool:
    """Return whether a file is JSON lines or Parquet by its name."""
    return _uncompressed(path).endswith(JSON_LINES) or str(path).endswith(".parquet")


def is_plain_text(path: str | Path) -> bool:
    """Return whether a file is plain text by its name."""
    return _uncompressed(path).endswith(PLAIN_TEXT)


def _uncompressed(path: str | Path) -> str:
    name = str(path)
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return name


def _read_lines(
    opened: Any, path: str, fields: Fields, bad: BadData, shard: Shard, start: FileOffset
) -> Iterator[Record]:
    number, position = start.documents, start.bytes
    if Path(path).suffix in COMPRESSIONS:
        lines, passed = _decompressed(opened, path), 0  # a compressed file can be read from its beginning only
        while passed < position and (piece := lines.read(min(position - passed, PIECE_BYTES))):
            passed += len(piece)
    else:
        opened.seek(position)
        lines = _decompressed(opened, path)
    while line := lines.readline(fields.max_bytes + 1):
        length, complete = len(line), len(line) <= fields.max_bytes or line.endswith(b"\n")
        while not (complete or line.endswith(b"\n")) and (line := lines.readline(PIECE_BYTES)):
            length += len(line)  # the rest of a document that is too long
        position += length
        if number in shard:
            try:
                if not complete:
                    raise too_long(length - line.endswith(b"\n"), fields)
                yield Record(number, *parse(_from_json(line), fields), FileOffset(number + 1, position))
            except UnusableError as error:
                bad.handle(f"{path}, line {number + 1:,}", error)
        number += 1
    if number == 0:
        raise UnusableError("empty file")


def _read_text(
    opened: Any, path: str, fields: Fields, bad: BadData, shard: Shard, start: FileOffset
) -> Iterator[Record]:
    number = position = 0
    for content in _pieces(_decompressed(opened, path), fields):
        position += len(content)
        if len(content) > fields.max_bytes:
            raise UnusableError("document too long", f"more than {fields.max_bytes:,} bytes; make several files of it")
        if number >= start.documents and number in shard:
            try:
                yield Record(number, decode_text(content, number == 0), None, FileOffset(number + 1, position))
            except UnusableError as error:
                bad.handle(path, error)
        number += 1
    if number == 0:
        raise UnusableError("empty file")


def _pieces(stream: io.BufferedReader, fields: Fields) -> Iterator[bytes]:
    """Cut a text at ends of lines into pieces that are not blank: blank lines belong to the piece before them."""
    rest = b""
    while content := rest + stream.read(fields.text_bytes or fields.max_bytes + 1) + stream.readline(fields.max_bytes):
        while (rest := stream.readline(fields.max_bytes)) and not (rest.strip() and content.strip()):
            content += rest
            if len(content) > fields.max_bytes:
                break
        yield content


def decode_text(content: bytes, beginning: bool = True) -> str:
    """Decode plain text; line ends are kept as they are, a byte order mark at the `beginning` of a file is not."""
    if b"\0" in content:
        raise UnusableError("not text", "it has zero bytes, as binary files and UTF-16 have; convert it to UTF-8")
    try:
        text = content.decode("utf-8-sig" if beginning else "utf-8")
    except UnicodeDecodeError as error:
        raise UnusableError("not UTF-8", f"from byte {error.start:,} on; convert it to UTF-8") from error
    if not text.strip():
        raise UnusableError("empty document")
    return text


def _decompressed(opened: Any, path: str) -> io.BufferedReader:
    if compression := COMPRESSIONS.get(Path(path).suffix):
        return io.BufferedReader(pa.CompressedInputStream(opened, compression), PIECE_BYTES)
    return io.BufferedReader(opened, PIECE_BYTES)


def _from_json(line: bytes) -> Any:
    try:
        return json.loads(line.rstrip(b"\n").decode("utf-8-sig"))  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise UnusableError("not UTF-8", f"from byte {error.start} on") from error
    except (ValueError, RecursionError) as error:
        raise UnusableError("not JSON", str(error)) from error


def _read_parquet(
    opened: Any, path: str, fields: Fields, bad: BadData, shard: Shard, start: FileOffset
) -> Iterator[Record]:
    """Skip the row groups before `start`; hold a row group's bytes of two columns."""
    file = pq.ParquetFile(opened)
    known = file.schema_arrow.names
    if (column := fields.content.split(".")[0]) not in known:
        raise UnusableError("no such column", f"{column}; there are {', '.join(known)}")
    columns = {column} | ({fields.domain.split(".")[0]} & set(known) if fields.domain else set())
    number = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if number + rows <= start.documents:
            number += rows
            continue
        for batch in file.iter_batches(ROWS, [group], sorted(columns), use_threads=False):
            for row in range(batch.num_rows):
                if number >= start.documents and number in shard:
                    try:
                        (record,) = batch.slice(row, 1).to_pylist()
                        yield Record(number, *parse(record, fields), FileOffset(number + 1))
                    except UnusableError as error:
                        bad.handle(f"{path}, row {number + 1:,}", error)
                    except UnicodeDecodeError:  # pyarrow does not check that text is UTF-8
                        bad.handle(f"{path}, row {number + 1:,}", UnusableError("not UTF-8"))
                number += 1
    if number == 0:
        raise UnusableError("empty file")
