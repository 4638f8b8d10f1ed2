"""The tokens of a text: arrays of many files as one, and the baselines of the loss that they give."""

from __future__ import annotations

import lzma
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.validation import RunError

OPEN_FILES = 256  # mapped at a time by a process; each takes a file descriptor, of which many systems allow 1,024
# Both baselines are bounded in time and memory, whatever the size of the corpus (but for `mask_eod_loss`, which reads all
# evaluated tokens).
MAX_TOKENS = 50_000_000  # counted for the unigram model, in training and evaluation text each
MAX_BYTES = 20_000_000  # compressed, over all domains; xz needs about a second per MB


class Piece(NamedTuple):
    """Tokens `first` to `first + length - 1` of a file of tokens."""

    path: Path
    first: int
    length: int


class ChainedTokens:
    """Pieces of files as one array: it has a length, a dtype and slices, which are copied only where they cross a border.

    Files are mapped when they are read.

    Args:
        pieces: the pieces, in order.
        dtype: type of the tokens of all files.
        maps: files that are mapped, of this and other arrays of the corpus.
    """

    def __init__(self, pieces: Sequence[Piece], dtype: np.dtype, maps: dict[Path, np.ndarray]) -> None:
        self.dtype = dtype
        self._pieces = [piece for piece in pieces if piece.length]
        self._starts = [0, *accumulate(piece.length for piece in self._pieces)]
        self._maps = maps

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, _ = index.indices(len(self))
        pieces = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            path, first, length = self._pieces[number]
            offset = start - self._starts[number]
            pieces.append(self._map(path)[first + offset : first + min(length, stop - self._starts[number])])
            number += 1
            start = self._starts[number]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.zeros(0, self.dtype)])

    def first(self, count: int) -> ChainedTokens:
        """Return the first `count` tokens, without reading them."""
        ends = zip(self._pieces, self._starts, strict=False)
        cut = [piece._replace(length=max(0, min(piece.length, count - start))) for piece, start in ends]
        return ChainedTokens(cut, self.dtype, self._maps)

    def _map(self, path: Path) -> np.ndarray:
        if path not in self._maps:
            if len(self._maps) >= OPEN_FILES:
                self._maps.clear()
            self._maps[path] = np.memmap(path, self.dtype, mode="r")
        return self._maps[path]


Tokens: TypeAlias = np.ndarray | ChainedTokens
"""Token ids, [N]: what has a length, a dtype and slices."""


def unigram_entropy(train: Sequence[Tokens], evaluated: Sequence[Tokens], vocab_size: int) -> float:
    """Compute the loss of the best context-free model, in nats per token.

    Cross-entropy of the training tokens' frequencies (add-one smoothed) on the evaluated tokens, both of each domain, [N_d]. A
    model that uses context has a lower loss. At most `MAX_TOKENS` are counted of either, see `count_tokens`.
    """
    train_counts = count_tokens(train, vocab_size) + 1
    counts = count_tokens(evaluated, vocab_size)
    return float(-(counts * np.log(train_counts / train_counts.sum())).sum() / counts.sum())


def xz_bits_per_byte(evaluated: Mapping[str, Tokens], tokenizer: Tokenizer) -> dict[str, float]:
    """Compress the evaluated text by `xz -9`: domain -> bits per byte, and "all" for all domains together.

    Each domain's tokens, [N_d], are cut to an equal share of `MAX_BYTES`, from their beginning. Domains without text are left
    out; the result is empty if no domain has text.
    """
    texts = {}
    for name, tokens in evaluated.items():
        share = MAX_BYTES // len(evaluated)
        tokens = tokens[:share]  # each token but the end of a document has a byte or more
        tokens = tokens[tokens != tokenizer.eod_id]
        fitting = int(np.searchsorted(np.cumsum(tokenizer.token_bytes[tokens]), share, side="right"))
        if fitting > 0:
            texts[name] = tokenizer.decode(tokens[:fitting].tolist()).encode()
    if len(texts) > 1:
        texts["all"] = b"".join(texts.values())
    bits_per_byte = {name: 8 * len(lzma.compress(text, preset=9)) / len(text) for name, text in texts.items()}
    if len(texts) == 1:
        (bits_per_byte["all"],) = bits_per_byte.values()
    return bits_per_byte


def count_tokens(streams: Sequence[Tokens], vocab_size: int) -> np.ndarray:
    """Count each token id, [vocab_size]; above `MAX_TOKENS`, the first ones of each stream, by its share."""
    total = sum(len(stream) for stream in streams)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for stream in streams:
        wanted = len(stream) if total <= MAX_TOKENS else len(stream) * MAX_TOKENS // total
        tokens = stream[:wanted]
        check_ids(tokens, vocab_size, "The corpus")
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def check_ids(ids: np.ndarray, vocab_size: int, place: str) -> None:
    """Check that the tokenizer has all ids: with others the embedding would crash or read invalid memory."""
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        problem = f"{place} holds token ids from {ids.min()} to {ids.max()}, but the tokenizer has {vocab_size}"
        reason = "the corpus is damaged there, or made with another tokenizer"
        raise RunError(f"{problem}: {reason}. Build it again, or set data.tokenizer.")
