"""Megatron's indexed dataset: `prefix.bin` holds the tokens, `prefix.idx` the place of each sequence.

Layout of the index, little-endian throughout:

    9 bytes   magic "MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     code of the token type (`DTYPES`)
    uint64    number of sequences S
    uint64    number of document boundaries D
    int32[S]  tokens of each sequence
    int64[S]  byte offset of each sequence in the .bin
    int64[D]  sequence at which each document starts, closed by S

This module reads files of Megatron's tools; these read files of `indexed_writer.py`. Memory does not grow with the corpus: the
index of the Pile alone has 4 GB.
"""

import struct
from pathlib import Path

import numpy as np

from nlgmoe.files import require_regular
from nlgmoe.validation import RunError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK = 1 << 18  # entries of an index in memory at a time
HEADER = struct.Struct("<9sQBQQ")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type Megatron stores tokens of such a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDataset:
    """Memory-mapped reader; `dataset[i]` is the i-th sequence.

    Args:
        prefix: path without `.bin` / `.idx`.

    Attributes:
        tokens: all tokens of the .bin, [total].
        lengths: tokens of each sequence, int32 [S].
        pointers: byte offset of each sequence, int64 [S]; each starts where the one before it ends.
        document_indices: first sequence of each document, closed by S, int64 [D].

    Raises:
        ValueError: a file is missing, is not of this format, or the two do not belong together.
    """

    def __init__(self, prefix: Path) -> None:
        index_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index_path, bin_path):
            if not path.exists():
                raise RunError(f"{path} is missing. An indexed dataset is two files, .bin and .idx: copy both.")
            require_regular(path, "copy it anew")
        code, sequences, boundaries = _read_header(index_path)
        self.dtype = np.dtype(DTYPES[code])
        index = np.memmap(index_path, np.uint8, mode="r")
        self.lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
        self.pointers = np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences)
        self.document_indices = np.frombuffer(index, "<i8", boundaries, HEADER.size + 12 * sequences)
        expected, size = self._check_index(index_path), bin_path.stat().st_size
        if size != expected:
            raise RunError(f"{bin_path} has {size} bytes, {index_path} says {expected}: cut off? Build it again.")
        # An empty file cannot be mapped.
        self.tokens = np.memmap(bin_path, self.dtype, mode="r") if size else np.zeros(0, self.dtype)

    def first_token(self, document: int) -> int:
        """Return where a document starts in `tokens`; for the number of documents, the end."""
        sequence = int(self.document_indices[document])
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < len(self) else len(self.tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    def _check_index(self, path: Path) -> int:
        """Return where the last sequence ends, in bytes."""
        end = 0
        for first in range(0, len(self), CHUNK):
            lengths, pointers = self.lengths[first : first + CHUNK], self.pointers[first : first + CHUNK]
            sizes = lengths * np.int64(self.dtype.itemsize)
            starts = end + np.cumsum(sizes) - sizes
            if len(wrong := np.flatnonzero((lengths < 0) | (pointers != starts))):
                i = wrong[0]
                raise RunError(
                    f"{path} is damaged: sequence {first + i} has {lengths[i]} tokens from byte {pointers[i]} on, the ones "
                    f"before it end at byte {starts[i]}. Build it again."
                )
            end = int(starts[-1] + sizes[-1])
        documents = self.document_indices
        rising = all(
            (np.diff(documents[first : first + CHUNK + 1]) >= 0).all() for first in range(0, len(documents), CHUNK)
        )
        if not (len(documents) and documents[0] == 0 and documents[-1] == len(self) and rising):
            raise RunError(
                f"{path} is damaged: its documents do not rise from sequence 0 to {len(self)}. Build it again."
            )
        return end


def _read_header(path: Path) -> tuple[int, int, int]:
    """Return the code of the token type and the numbers of sequences and of document boundaries."""
    with path.open("rb") as handle:
        header = handle.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise RunError(f"{path} does not start with {MAGIC!r}: not the index of an indexed dataset.")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != VERSION or code not in DTYPES:
        raise RunError(
            f"{path} has version {version} and type code {code}; known are version 1 and integers, codes "
            f"{', '.join(map(str, DTYPES))}."
        )
    expected, size = HEADER.size + 12 * sequences + 8 * boundaries, path.stat().st_size
    if size != expected:
        raise RunError(f"{path} has {size} bytes, its header says {expected}: cut off? Build it again.")
    return code, sequences, boundaries
