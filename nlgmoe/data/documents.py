"""Read the documents of a file in order, from any of them on, in constant memory: JSON lines, Parquet, plain text.

A document without text is left out and counted: nothing but white space, a blank line of JSON lines, an empty file of
plain text. It keeps its number in the file.

JSON lines and plain text may be compressed (.gz, .zst). pyarrow decompresses them, since it detects truncated streams, which
zstandard's reader does not. Its JSON reader is not used: it reports no line numbers.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from huggingface_hub.errors import HTTPError

from nlgmoe.data.source_files import COMPRESSIONS, WHOLE, DataFile, is_plain_text
from nlgmoe.data.tokenizer import byte_without_token
from nlgmoe.validation import RunError

BUFFER_BYTES = 1 << 16  # decompressed at a time; of a truncated file, up to as much is lost before the cut
ROWS = 64  # of Parquet, decoded at a time
# Tokenising takes some 130 bytes for a byte of text: 2.6 GB for a document of this size.
MAX_DOCUMENT_BYTES = 20_000_000


class UnusableError(ValueError):
    """A document or file cannot be used for this reason; `read_documents` adds the place."""


class NoTextError(UnusableError):
    """A document has no text."""


Skip = Callable[[str], object]
_MISSING = object()
ONE_A_LINE = "one document a line, as `jq -c .[]` writes an array"


@dataclass(frozen=True)
class Fields:
    """What to read of a record. Names may be dotted: `meta.pile_set_name`.

    Checkpoints of streams hold the representation: with a new field in it they cannot be resumed.
    """

    text: str = "text"  # a string
    domain: str | None = None
    max_bytes: int = MAX_DOCUMENT_BYTES  # of a document's line, or of its text in Parquet and plain text
    # Bytes without a token in the tokenizer; a text that has one cannot be used.
    missing_bytes: bytes = field(default=b"", repr=False)
    # Plain text is cut at the ends of lines into documents of at least so many bytes; None: one document a file.
    text_bytes: int | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """One document of a file."""

    number: int  # index in its file, unusable documents and those without text included
    content: str  # its text
    domain: str | None
    bytes: int  # uncompressed size of its line or text; in Parquet, characters of its text


def read_documents(
    path: str | Path,
    fields: Fields,
    shard: range = WHOLE,
    start: int = 0,
    skip: Skip | None = None,
    count_empty: Callable[[], object] = lambda: None,
) -> Iterator[Record]:
    """Yield the documents of a file that have text.

    Args:
        path: a local file, or an address that fsspec opens (`hf://datasets/...`), of a known ending (`source_files.py`).
        fields: what to read.
        shard: the documents to yield; others are neither parsed nor checked.
        start: documents at the beginning to leave out.
        skip: called with place and reason of each document, file or end of a file that cannot be used; None: raise an error.
        count_empty: called for each document without text.
    """
    read, unit = (_read_parquet, "row") if str(path).endswith(".parquet") else (_read_lines, "line")
    if is_plain_text(path):
        read, unit = _read_text, ""

    def refuse(place: str, reason: object) -> None:
        if skip is None:
            raise RunError(f"{place}: {reason}; repair it, or leave it out with nlgmoe prepare-data --on-bad-data skip")
        skip(f"{place}: {reason}")

    number = start
    try:
        file_system, name = url_to_fs(str(path))
        with file_system.open(name, "rb") as opened:
            for number, size, parsed in read(opened, str(path), fields, start):
                if number in shard:
                    try:
                        content, domain = parsed()
                        if reason := byte_without_token(content, fields.missing_bytes):
                            raise UnusableError(reason)
                    except NoTextError:
                        count_empty()
                    except UnusableError as error:
                        refuse(f"{path}{unit and f', {unit} {number + 1:,}'}", error)
                    else:
                        yield Record(number, content, domain, size or len(content))
                number += 1
        if number == 0 and unit:
            raise UnusableError("empty file")
        if number == 0 in shard and not unit:
            count_empty()
    except GeneratorExit:  # when the interpreter exits, the classes below no longer exist
        raise
    except (UnusableError, FileNotFoundError) as error:
        refuse(str(path), error if isinstance(error, UnusableError) else "missing file")
    except (OSError, pa.ArrowException, HTTPError) as failure:
        place = f"{path}, after document {number:,}"
        refuse(place, f"damaged or cut off ({_require_damage(failure, place)})")


def _require_damage(failure: Exception, place: str) -> str:
    """Return what is damaged; a failure of a disk or network, which is never skipped, is raised."""
    details = " ".join(str(failure).split())
    # Errors of decompression have no errno.
    if isinstance(failure, pa.ArrowException) or (type(failure) is OSError and failure.errno is None):
        return details
    remedy = "run the command again when it can be, training with --ckpt_path last"
    raise RunError(f"{place}: cannot be read ({details}); {remedy}") from failure


# Readers yield the number of each document from `start` on, its bytes, and a function that parses it.
_Content = tuple[str, str | None]  # and domain
_Documents = Iterator[tuple[int, int, Callable[[], _Content]]]


def _read_lines(opened: Any, path: str, fields: Fields, start: int) -> _Documents:
    lines, number = _decompressed(opened, path), 0
    while line := lines.readline(fields.max_bytes + 1):
        length, complete = len(line), len(line) <= fields.max_bytes or line.endswith(b"\n")
        while not (complete or line.endswith(b"\n")) and (line := lines.readline(BUFFER_BYTES)):
            length += len(line)  # the rest of a document that is too long
        if number >= start:
            parse = partial(_parse_line, line if complete else None, length - line.endswith(b"\n"), fields)
            yield number, length, parse
        number += 1


def _read_text(opened: Any, path: str, fields: Fields, start: int) -> _Documents:
    for number, content in enumerate(_pieces(_decompressed(opened, path), fields)):
        if len(content) > fields.max_bytes:
            raise UnusableError(f"document too long (more than {fields.max_bytes:,} bytes; make several files of it)")
        if number >= start:
            yield number, len(content), partial(_parse_text, content, number)


def _pieces(stream: io.BufferedReader, fields: Fields) -> Iterator[bytes]:
    """Cut a text at ends of lines into pieces that are not blank: blank lines belong to the piece before them."""
    rest = b""
    while content := rest + stream.read(fields.text_bytes or fields.max_bytes + 1) + stream.readline(fields.max_bytes):
        while (rest := stream.readline(fields.max_bytes)) and not (rest.strip() and content.strip()):
            content += rest
            if len(content) > fields.max_bytes:
                break
        yield content


def _read_parquet(opened: Any, path: str, fields: Fields, start: int) -> _Documents:
    """Skip the row groups before `start`; hold a row group's bytes of two columns."""
    file = pq.ParquetFile(opened)
    known = file.schema_arrow.names
    if (column := fields.text.split(".")[0]) not in known:
        raise UnusableError(f"no such column ({column}; there are {', '.join(known)})")
    columns = {column} | ({fields.domain.split(".")[0]} & set(known) if fields.domain else set())
    number = 0
    for group in range(file.num_row_groups):
        if number + (rows := file.metadata.row_group(group).num_rows) <= start:
            number += rows
            continue
        for batch in file.iter_batches(ROWS, [group], sorted(columns), use_threads=False):
            for row in range(batch.num_rows):
                if number >= start:
                    yield number, 0, partial(_parse_row, batch, row, fields)
                number += 1


def _decompressed(opened: Any, path: str) -> io.BufferedReader:
    compression = COMPRESSIONS.get(Path(path).suffix)
    return io.BufferedReader(pa.CompressedInputStream(opened, compression) if compression else opened, BUFFER_BYTES)


def decode_text(content: bytes, beginning: bool = True) -> str:
    """Decode plain text; line ends are kept as they are, a byte order mark at the `beginning` of a file is not."""
    if b"\0" in content:
        raise UnusableError("not text (it has zero bytes, as binary files and UTF-16 have; convert it to UTF-8)")
    try:
        text = content.decode("utf-8-sig" if beginning else "utf-8")
    except UnicodeDecodeError as error:
        raise UnusableError(f"not UTF-8 (from byte {error.start:,} on; convert it to UTF-8)") from error
    return _with_text(text)


def _with_text(text: str) -> str:
    if not text or text.isspace():
        raise NoTextError("empty document")
    return text


def _parse_text(content: bytes, number: int) -> _Content:
    return decode_text(content, number == 0), None


def _parse_line(line: bytes | None, length: int, fields: Fields) -> _Content:
    if line is None:
        raise _too_long(length, fields)
    try:
        text = _with_text(line.rstrip(b"\n").decode("utf-8-sig"))  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise UnusableError(f"not UTF-8 (from byte {error.start} on)") from error
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"not JSON ({error}; {ONE_A_LINE})") from error
    return _parse_record(record, fields)


def _parse_row(batch: pa.RecordBatch, row: int, fields: Fields) -> _Content:
    try:
        (record,) = batch.slice(row, 1).to_pylist()
    except UnicodeDecodeError as error:  # pyarrow does not check that text is UTF-8
        raise UnusableError("not UTF-8") from error
    return _parse_record(record, fields)


def _parse_record(record: Any, fields: Fields) -> _Content:
    if not isinstance(record, dict):
        raise UnusableError(f"no JSON object ({ONE_A_LINE})")
    domain = None if fields.domain is None else _look_up(record, fields.domain)
    content = _look_up(record, fields.text, _MISSING)
    if content is _MISSING:
        raise UnusableError(f"no such field ({fields.text})")
    if content is None:
        raise NoTextError("empty document")
    return _check_text(content, fields), None if domain is None else str(domain)


def _look_up(record: Any, name: str, missing: Any = None) -> Any:
    for part in name.split("."):
        if record is None:
            return None
        record = record.get(part, missing) if isinstance(record, dict) else missing
    return record


def _check_text(value: Any, fields: Fields) -> str:
    if not isinstance(value, str):
        raise UnusableError(f"not text ({fields.text} is of type {type(value).__name__})")
    try:
        length = len(value) if _with_text(value).isascii() else len(value.encode())
    except UnicodeEncodeError as error:  # JSON can spell half a character: "\ud800"
        raise UnusableError("not UTF-8 (half of a surrogate pair)") from error
    if length > fields.max_bytes:
        raise _too_long(length, fields)
    return value


def _too_long(length: int, fields: Fields) -> UnusableError:
    return UnusableError(f"document too long ({length:,} bytes; at most {fields.max_bytes:,} are allowed)")


def read_shares(
    files: Sequence[DataFile], fields: Fields, limit: int, skip: Skip | None = None
) -> Iterator[tuple[Record, float]]:
    """Yield the first documents of each file, some `limit` bytes of text in all, which files share by their sizes.

    With each document: the fraction of it, from its beginning, that belongs to its file's share.
    """
    sizes = [max(1, file.bytes) for file in files]
    for file, size in zip(files, sizes, strict=True):
        share = limit * size / sum(sizes)
        for record in read_documents(file.path, fields, skip=skip):
            yield record, min(1.0, share / record.bytes)
            share -= record.bytes
            if share <= 0:
                break
