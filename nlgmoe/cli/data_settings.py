"""What the settings of `data` say before its objects are built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser

from nlgmoe.data import Corpus
from nlgmoe.data.corpus import own_tokenizer
from nlgmoe.data.tokenizer_loading import DEFAULT_TOKENIZER


def tokenizer_of(data: Mapping[str, Any]) -> str:
    """Return the tokenizer of a run: `data.tokenizer`, or the corpus's own.

    Args:
        data: the settings `data` of a configuration.

    Raises:
        ValueError: the corpus cannot be built from its settings, or its files are missing.
    """
    if (name := data.get("tokenizer")) is not None:
        return str(name)
    if (settings := data.get("corpus")) is None:
        return DEFAULT_TOKENIZER
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--corpus", type=Corpus)
    corpus = parser.instantiate_classes(parser.parse_object({"corpus": settings})).corpus
    return own_tokenizer(corpus) or DEFAULT_TOKENIZER
