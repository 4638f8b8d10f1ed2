"""Megatron's indexed dataset: `prefix.bin` holds the tokens, `prefix.idx` says where each sequence lies.

Layout of the index, little-endian throughout:

    9 bytes   magic "MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     code of the token type (`DTYPES`)
    uint64    number of sequences S
    uint64    number of document boundaries D
    int32[S]  tokens of each sequence
    int64[S]  byte offset of each sequence in the .bin
    int64[D]  sequence at which each document starts, closed by S

Corpora tokenised with Megatron's tools can be read here and the other way round.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_HEADER = struct.Struct("<9sQBQQ")


def token_dtype(vocab_size: int) -> np.dtype:
    """The type Megatron stores tokens of such a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Write documents of one sequence each; both files appear, complete, when the `with` block ends well.

    Args:
        prefix: path without `.bin` / `.idx`.
        dtype: type of the stored tokens, one of `DTYPES`.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._code = next((code for code, known in DTYPES.items() if np.dtype(known) == self._dtype), None)
        if self._code is None:
            raise ValueError(
                f"dtype {dtype} cannot be stored; use one of {', '.join(d.__name__ for d in DTYPES.values())}."
            )
        self._lengths: list[int] = []
        self._temporary = {kind: Path(f"{prefix}.{kind}.{os.getpid()}.tmp") for kind in ("bin", "idx")}
        self._bin = self._temporary["bin"].open("wb")

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document.

        Raises:
            ValueError: a token does not fit the stored type.
        """
        array = np.asarray(tokens)
        stored = array.astype(self._dtype)
        if not np.array_equal(stored, array):
            raise ValueError(f"A token does not fit {self._dtype}: ids reach {array.max()}. Use a wider dtype.")
        self._bin.write(stored.tobytes())
        self._lengths.append(len(stored))

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write_index()
            os.fsync(self._bin.fileno())
        self._bin.close()
        for name, path in self._temporary.items():
            if kind is None:
                path.replace(f"{self._prefix}.{name}")
            else:
                path.unlink(missing_ok=True)

    def _write_index(self) -> None:
        lengths = np.asarray(self._lengths, dtype=np.int64)
        ends = np.cumsum(lengths * self._dtype.itemsize)
        pointers = np.concatenate([np.zeros(1, dtype=np.int64), ends])[: len(lengths)]
        with self._temporary["idx"].open("wb") as handle:
            handle.write(_HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(lengths) + 1))
            handle.write(lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes())
            handle.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            handle.flush()
            os.fsync(handle.fileno())
        self._bin.flush()


class IndexedDataset:
    """Memory-mapped reader; `dataset[i]` is the i-th sequence.

    Args:
        prefix: path without `.bin` / `.idx`.

    Attributes:
        tokens: all tokens of the .bin, [total].
        lengths: tokens of each sequence, int32 [S].
        pointers: byte offset of each sequence, int64 [S].
        document_indices: first sequence of each document, closed by S, int64 [D].

    Raises:
        ValueError: a file is missing, is not of this format, or the two do not belong together.
    """

    def __init__(self, prefix: Path) -> None:
        index_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index_path, bin_path):
            if not path.exists():
                raise ValueError(f"{path} is missing. An indexed dataset is two files, .bin and .idx: copy both.")
        # Mapped, not read: the index of the Pile has 4 GB, and every process of a node opens it.
        index = np.memmap(index_path, np.uint8, mode="r") if index_path.stat().st_size else np.zeros(0, np.uint8)
        header = bytes(index[: _HEADER.size])
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{index_path} does not start with {MAGIC!r}: not the index of an indexed dataset.")
        _, version, code, sequences, boundaries = _HEADER.unpack(header)
        if version != VERSION or code not in DTYPES:
            raise ValueError(
                f"{index_path} has version {version} and type code {code}; known are version 1, codes 1-8."
            )
        size = _HEADER.size + 12 * sequences + 8 * boundaries
        if len(index) != size:
            raise ValueError(f"{index_path} has {len(index)} bytes, its header says {size}: cut off? Build it again.")
        self.dtype = np.dtype(DTYPES[code])
        self.lengths = np.frombuffer(index, "<i4", sequences, _HEADER.size)
        self.pointers = np.frombuffer(index, "<i8", sequences, _HEADER.size + 4 * sequences)
        self.document_indices = np.frombuffer(index, "<i8", boundaries, _HEADER.size + 12 * sequences)
        expected = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        found = bin_path.stat().st_size
        if found != expected:
            raise ValueError(f"{bin_path} has {found} bytes, {index_path} says {expected}: cut off? Build it again.")
        inside = all(
            lengths.min() >= 0 and pointers.min() >= 0 and (pointers + lengths).max() <= found
            for lengths, pointers in self._byte_ranges()
        )
        if not inside or boundaries == 0 or self.document_indices[-1] != sequences:
            raise ValueError(f"{index_path} holds impossible lengths, offsets or documents. Build it again.")
        # An empty file cannot be mapped.
        self.tokens = np.memmap(bin_path, self.dtype, mode="r") if found else np.zeros(0, self.dtype)

    @property
    def in_order(self) -> bool:
        """Whether each sequence lies right behind the one before it, as Megatron's tools write them."""
        end = 0
        for lengths, pointers in self._byte_ranges():
            ends = end + np.cumsum(lengths)
            if not np.array_equal(pointers, ends - lengths):
                return False
            end = int(ends[-1])
        return True

    def first_token(self, document: int) -> int:
        """Position in `tokens` where a document starts; for the number of documents, the end. Needs `in_order`."""
        sequence = int(self.document_indices[document])
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < len(self) else len(self.tokens)

    def _byte_ranges(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(bytes, byte offset) of the sequences, both int64, a chunk at a time: the Pile has 200 million."""
        for start in range(0, len(self.lengths), 1 << 22):
            chunk = slice(start, start + (1 << 22))
            yield self.lengths[chunk].astype(np.int64) * self.dtype.itemsize, self.pointers[chunk]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]
