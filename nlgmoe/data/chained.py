"""Token arrays of many files, read as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

OPEN_FILES = 256  # mapped at a time by a process; each takes a file descriptor, of which many systems allow 1,024


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
        found = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            path, first, length = self._pieces[number]
            offset = start - self._starts[number]
            found.append(self._map(path)[first + offset : first + min(length, stop - self._starts[number])])
            number += 1
            start = self._starts[number]
        return found[0] if len(found) == 1 else np.concatenate(found or [np.zeros(0, self.dtype)])

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


def first_tokens(tokens: Tokens, count: int) -> Tokens:
    """Return the first `count` tokens, without reading them."""
    return tokens.first(count) if isinstance(tokens, ChainedTokens) else tokens[:count]
