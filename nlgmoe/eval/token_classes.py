"""Kinds of tokens, told from the bytes of text that a token stands for."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

CLASSES = (
    "word start",  # a letter after a space: " the"
    "word part",  # a letter without one: "ing"; also a word at the beginning of a line
    "number",
    "punctuation",  # of prose
    "code symbol",  # such as { = _ <
    "whitespace",  # nothing else
    "end of document",  # no byte at all
    "other",  # symbols beyond ASCII, control characters, parts of a character
)
PROSE = frozenset(".,;:!?'\"()-")


def token_class(spelling: bytes) -> str:
    """One of `CLASSES`, decided by the first character that is no whitespace."""
    if not spelling:
        return "end of document"
    try:
        text = spelling.decode()
    except UnicodeDecodeError:
        return "other"
    stripped = text.lstrip()
    if not stripped:
        return "whitespace"
    first = stripped[0]
    if first.isalpha():
        return "word start" if text[0].isspace() else "word part"
    if first.isnumeric():
        return "number"
    if first.isascii() and first.isprintable():
        return "punctuation" if first in PROSE else "code symbol"
    return "punctuation" if unicodedata.category(first).startswith("P") else "other"


def class_ids(spellings: Sequence[bytes]) -> list[int]:
    """Index into `CLASSES` of each token id, `[V]`."""
    return [CLASSES.index(token_class(spelling)) for spelling in spellings]
