"""Records of a file, and the checks that make one a document: text or token ids to train on."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nlgmoe.data.text.bad_data import UnusableError

# Tokenising takes some 130 bytes for a byte of text: 2.6 GB for a document of this size.
MAX_DOCUMENT_BYTES = 20_000_000


@dataclass(frozen=True)
class Fields:
    """Fields of a record. Names may be dotted: `meta.pile_set_name`.

    Args:
        text: a string.
        ids: a list of token ids, read in place of `text`; None: read the text.
        domain: the document's domain; None: there is none.
        vocab_size: ids must be below it; None: unchecked.
        max_bytes: longest line of a document, or text in Parquet and plain text.
        text_bytes: plain text is cut at the ends of lines into documents of at least so many bytes; None: one document a file.
    """

    text: str = "text"
    ids: str | None = None
    domain: str | None = None
    vocab_size: int | None = None
    max_bytes: int = MAX_DOCUMENT_BYTES
    text_bytes: int | None = field(default=None, repr=False)  # checkpoints hold the representation of the others

    @property
    def content(self) -> str:
        """The field that is read."""
        return self.text if self.ids is None else self.ids


@dataclass(frozen=True, slots=True)
class FileOffset:
    """A position between two documents of a file.

    Args:
        documents: before it, unusable ones included.
        bytes: before it, uncompressed; 0 in Parquet.
    """

    documents: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One document of a file.

    Args:
        number: of the document in its file, from 0, unusable ones counted.
        content: its text, or its token ids as int64 [N].
        domain: in the file; None if it has none.
        after: offset of the next document.
    """

    number: int
    content: str | np.ndarray
    domain: str | None
    after: FileOffset


@dataclass(frozen=True, slots=True)
class Shard:
    """Every `count`-th document of a file, from the `index`-th on."""

    index: int = 0
    count: int = 1

    def __contains__(self, number: int) -> bool:
        return number % self.count == self.index


def parse(record: Any, fields: Fields) -> tuple[str | np.ndarray, str | None]:
    """Return content and domain of a record."""
    domain = None if fields.domain is None else _look_up(record, fields.domain)
    content = _look_up(record, fields.content)
    if content is None:
        raise UnusableError("no such field", fields.content)
    checked = _check_text(content, fields) if fields.ids is None else _check_ids(content, fields)
    return checked, None if domain is None else str(domain)


def too_long(length: int, fields: Fields) -> UnusableError:
    """Return the error for a document of too many bytes."""
    return UnusableError("document too long", f"{length:,} bytes; at most {fields.max_bytes:,} are allowed")


def _look_up(record: Any, name: str) -> Any:
    for part in name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def _check_text(value: Any, fields: Fields) -> str:
    if not isinstance(value, str):
        raise UnusableError("not text", f"{fields.content} is of type {type(value).__name__}")
    if not value:
        raise UnusableError("empty document")
    try:
        length = len(value.encode())
    except UnicodeEncodeError as error:  # JSON can spell half a character: "\ud800"
        raise UnusableError("not UTF-8", "half of a surrogate pair") from error
    if length > fields.max_bytes:
        raise too_long(length, fields)
    return value


def _check_ids(value: Any, fields: Fields) -> np.ndarray:
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of different lengths
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UnusableError("not token ids", f"{fields.content} is no list of whole numbers")
    if ids.size == 0:
        raise UnusableError("empty document")
    if ids.min() < 0 or (fields.vocab_size is not None and ids.max() >= fields.vocab_size):
        known = "" if fields.vocab_size is None else f"; the tokenizer has {fields.vocab_size:,}"
        raise UnusableError("token ids of another tokenizer", f"from {ids.min()} to {ids.max()}{known}")
    return ids.astype(np.int64)
