"""What is read of a record, and what makes it a document: text or token ids that can be trained on."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from nlgmoe.data.text.bad_data import Unusable

# Tokenising holds some 130 bytes for a byte of text: 2.6 GB for a document of this size.
MAX_DOCUMENT_BYTES = 20_000_000


@dataclass(frozen=True)
class Fields:
    """Where a record has what is wanted. Names may be dotted: `meta.pile_set_name`.

    Args:
        text: a string.
        ids: a list of token ids, read in place of `text`; None: the text is.
        domain: the document's domain; None: there is none.
        vocab_size: ids must be below it; None: unchecked.
        max_bytes: of a document's line, or of its text in Parquet; what is longer cannot be used.
    """

    text: str = "text"
    ids: str | None = None
    domain: str | None = None
    vocab_size: int | None = None
    max_bytes: int = MAX_DOCUMENT_BYTES

    @property
    def content(self) -> str:
        """The field that is read."""
        return self.text if self.ids is None else self.ids


@dataclass(frozen=True, slots=True)
class FileOffset:
    """A place between two documents of a file.

    Args:
        documents: in front of it, unusable ones included.
        bytes: in front of it, uncompressed; 0 in Parquet.
    """

    documents: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One document of a file.

    Args:
        number: of the document in its file, from 0, unusable ones counted.
        content: its text, or its token ids as int64 [N].
        domain: as the file says it; None if it does not.
        after: the place behind it.
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


def decode(text: bytes, fields: Fields) -> str:
    """Text of bytes, if there are not too many.

    Raises:
        Unusable: there are, or they are not UTF-8.
    """
    if len(text) > fields.max_bytes:
        raise too_long(len(text), fields)
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8", f"from byte {error.start} on") from error


def too_long(length: int, fields: Fields) -> Unusable:
    """A document of too many bytes."""
    return Unusable("document too long", f"{length:,} bytes; at most {fields.max_bytes:,} are allowed")


def check(value: Any, fields: Fields) -> str | np.ndarray:
    """The content of a record, once it is known to be usable.

    Raises:
        Unusable: it is missing, empty, or not what `fields` says.
    """
    if value is None:
        raise Unusable("no such field", fields.content)
    if fields.ids is not None:
        return _check_ids(value, fields)
    if not isinstance(value, str):
        raise Unusable("not text", f"{fields.content} is of type {type(value).__name__}")
    if not value:
        raise Unusable("empty document")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character: "\ud800"
        raise Unusable("not UTF-8", "half of a surrogate pair") from error
    return value


def _check_ids(value: Any, fields: Fields) -> np.ndarray:
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of different lengths
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise Unusable("not token ids", f"{fields.content} is no list of whole numbers")
    if ids.size == 0:
        raise Unusable("empty document")
    if ids.min() < 0 or (fields.vocab_size is not None and ids.max() >= fields.vocab_size):
        known = "" if fields.vocab_size is None else f"; the tokenizer has {fields.vocab_size:,}"
        raise Unusable("token ids of another tokenizer", f"from {ids.min()} to {ids.max()}{known}")
    return ids.astype(np.int64)
