"""Incremental decoding of token ids to text: one character may span several tokens."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from nlgmoe.data.tokenizer import Tokenizer


class StreamingDetokenizer:
    """Decodes tokens one at a time and returns only complete characters; an end-of-document token has no text.

    Invalid UTF-8 becomes U+FFFD; a character that is incomplete at the end is discarded.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Return the characters that `token` completes."""
        return self._decoder.decode(self._tokenizer.spell(token))


def detokenize(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """Decode a whole sequence."""
    return "".join(map(StreamingDetokenizer(tokenizer).add, tokens))
