"""Classes of tokens, decided from a token's bytes."""

from __future__ import annotations

import unicodedata

CLASSES = (
    "word start",  # a letter after whitespace: " the"
    "word part",  # a letter without preceding whitespace: "ing"; also a word at the beginning of a line
    "number",
    "punctuation",  # of prose
    "code symbol",  # such as { = _ <
    "whitespace",  # only
    "end of document",  # no bytes
    "other",  # non-ASCII symbols, control characters, parts of a character
)
PROSE = frozenset(".,;:!?'\"()-")


def token_class(spelling: bytes) -> str:
    """Return the class, one of `CLASSES`, of a token's bytes; the first character that is not whitespace decides."""
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
