"""Text from tokens as they come: a character may be spelled by several of them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from nlgmoe.data.tokenizer import Tokenizer


class Spelling:
    """Gives characters when their last byte has come, so that none is ever broken; an end of document spells nothing.

    Bytes that are no UTF-8 are spelled as U+FFFD; a character whose end never comes is left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The characters that `token` completes."""
        return self._decoder.decode(self._tokenizer.spell(token))


def text_of(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """All of them at once."""
    spelling = Spelling(tokenizer)
    return "".join(map(spelling.add, tokens))
