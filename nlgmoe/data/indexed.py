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

Corpora tokenised with Megatron's tools can be read here and the other way round. Reader and writer take the same memory
for a million tokens and for a trillion: the index of the Pile alone has 4 GB.
"""

import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from nlgmoe.files import require_regular

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
FLOATS = {6: "float64", 7: "float32"}  # the format has them; token ids they are not
CHUNK = 1 << 18  # entries of an index in memory at a time
_HEADER = struct.Struct("<9sQBQQ")


def token_dtype(vocab_size: int) -> np.dtype:
    """The type Megatron stores tokens of such a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Write documents; both files appear, complete, when the `with` block ends well.

    Args:
        prefix: path without `.bin` / `.idx`.
        dtype: type of the stored tokens, one of `DTYPES`.
        folder: where the files grow, on the same file system, and stay if the block ends badly; None: one that goes then.
        sizes: what `position` has said: go on behind it with what is in `folder`.

    Raises:
        ValueError: tokens cannot be stored in this type, or there is less in `folder` than `sizes` says.
    """

    def __init__(
        self, prefix: Path, dtype: np.dtype, folder: Path | None = None, sizes: Mapping[str, int] | None = None
    ) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        codes = [code for code, known in DTYPES.items() if np.dtype(known) == self._dtype]
        if not codes:
            raise ValueError(
                f"dtype {dtype} cannot be stored; use one of {', '.join(d.__name__ for d in DTYPES.values())}."
            )
        self._code = codes[0]
        self._stays = folder is not None
        self._folder = folder or Path(tempfile.mkdtemp(prefix=f"{prefix.name}.building.", dir=prefix.parent))
        # An index begins with numbers that are known at the end: until then its parts are files of their own.
        self._files = {kind: self._open(kind, sizes) for kind in ("bin", "lengths", "ends")}
        self._sequences = sizes["lengths"] // 4 if sizes else 0

    def add_document(self, tokens: Sequence[int] | np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            tokens: of all its sequences.
            lengths: tokens of each of its sequences; None: it is one sequence.

        Raises:
            ValueError: a token does not fit the stored type.
        """
        array = np.asarray(tokens)
        stored = array.astype(self._dtype)
        if not np.array_equal(stored, array):
            raise ValueError(f"A token does not fit {self._dtype}: ids reach {array.max()}. Use a wider dtype.")
        counts = [len(stored)] if lengths is None else lengths
        assert sum(counts) == len(stored), f"sequences of {sum(counts)} tokens in a document of {len(stored)}"
        self._files["bin"].write(stored.tobytes())
        self._files["lengths"].write(np.asarray(counts, dtype="<i4").tobytes())
        self._sequences += len(counts)
        self._files["ends"].write(self._sequences.to_bytes(8, "little"))

    def position(self) -> dict[str, int]:
        """Put on disk what there is so far, and say how much: file -> bytes."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {kind: file.tell() for kind, file in self._files.items()}

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write_index()
                self.position()
                # An index stands beside the tokens it belongs to at every moment, or there is none.
                Path(f"{self._prefix}.idx").unlink(missing_ok=True)
                (self._folder / "bin").replace(f"{self._prefix}.bin")
                (self._folder / "idx").replace(f"{self._prefix}.idx")
        finally:
            for file in self._files.values():
                file.close()
            if kind is None or not self._stays:
                shutil.rmtree(self._folder)

    def _open(self, kind: str, sizes: Mapping[str, int] | None) -> BinaryIO:
        path = self._folder / kind
        if sizes is None:
            return path.open("w+b")
        if kind == "bin" and not path.exists() and Path(f"{self._prefix}.bin").exists():
            Path(f"{self._prefix}.bin").replace(path)  # it was moved there, and then the process was killed
        if not path.exists() or path.stat().st_size < sizes[kind]:
            raise ValueError(f"{path} is missing or cut off: delete {self._folder} to begin again.")
        file = path.open("r+b")
        file.truncate(sizes[kind])
        file.seek(0, os.SEEK_END)
        return file

    def _write_index(self) -> None:
        lengths, ends, item = self._files["lengths"], self._files["ends"], np.int64(self._dtype.itemsize)
        with (self._folder / "idx").open("wb") as handle:
            handle.write(_HEADER.pack(MAGIC, VERSION, self._code, self._sequences, ends.tell() // 8 + 1))
            lengths.seek(0)
            shutil.copyfileobj(lengths, handle, 8 * CHUNK)
            lengths.seek(0)
            position = 0
            while len(sizes := np.frombuffer(lengths.read(4 * CHUNK), "<i4") * item):
                behind = position + np.cumsum(sizes)
                handle.write((behind - sizes).astype("<i8").tobytes())
                position = int(behind[-1])
            handle.write(bytes(8))  # the first document starts at sequence 0
            ends.seek(0)
            shutil.copyfileobj(ends, handle, 8 * CHUNK)
            handle.flush()
            os.fsync(handle.fileno())


class IndexedDataset:
    """Memory-mapped reader; `dataset[i]` is the i-th sequence.

    Args:
        prefix: path without `.bin` / `.idx`.

    Attributes:
        tokens: all tokens of the .bin, [total].
        lengths: tokens of each sequence, int32 [S].
        pointers: byte offset of each sequence, int64 [S]; each lies right behind the one before it.
        document_indices: first sequence of each document, closed by S, int64 [D].

    Raises:
        ValueError: a file is missing, is not of this format, or the two do not belong together.
    """

    def __init__(self, prefix: Path) -> None:
        self._index_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (self._index_path, bin_path):
            if not path.exists():
                raise ValueError(f"{path} is missing. An indexed dataset is two files, .bin and .idx: copy both.")
            require_regular(path, "copy it anew")
        code, sequences, boundaries = self._read_header()
        self.dtype = np.dtype(DTYPES[code])
        self._fields: dict[str, tuple[np.dtype, int, int]] = {
            "lengths": (np.dtype("<i4"), sequences, _HEADER.size),
            "pointers": (np.dtype("<i8"), sequences, _HEADER.size + 4 * sequences),
            "document_indices": (np.dtype("<i8"), boundaries, _HEADER.size + 12 * sequences),
        }
        index = np.memmap(self._index_path, np.uint8, mode="r")
        self.lengths, self.pointers, self.document_indices = (
            np.frombuffer(index, dtype, count, offset) for dtype, count, offset in self._fields.values()
        )
        expected, found = self._check_sequences(), bin_path.stat().st_size
        if found != expected:
            raise ValueError(
                f"{bin_path} has {found} bytes, {self._index_path} says {expected}: cut off? Build it again."
            )
        self._check_documents()
        # An empty file cannot be mapped.
        self.tokens = np.memmap(bin_path, self.dtype, mode="r") if found else np.zeros(0, self.dtype)

    def chunks(self, field: str) -> Iterator[np.ndarray]:
        """One of the index's arrays in parts, read and not mapped: pages of a mapping stay in the process's memory."""
        dtype, count, offset = self._fields[field]
        with self._index_path.open("rb") as handle:
            handle.seek(offset)
            for start in range(0, count, CHUNK):
                yield np.frombuffer(handle.read(dtype.itemsize * min(CHUNK, count - start)), dtype)

    def first_token(self, document: int) -> int:
        """Position in `tokens` where a document starts; for the number of documents, the end."""
        sequence = int(self.document_indices[document])
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < len(self) else len(self.tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    def _read_header(self) -> tuple[int, int, int]:
        path = self._index_path
        with path.open("rb") as handle:
            header = handle.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{path} does not start with {MAGIC!r}: not the index of an indexed dataset.")
        _, version, code, sequences, boundaries = _HEADER.unpack(header)
        if code in FLOATS:
            raise ValueError(f"{path} is the index of {FLOATS[code]} numbers; token ids are integers.")
        if version != VERSION or code not in DTYPES:
            raise ValueError(f"{path} has version {version} and type code {code}; known are version 1, codes 1-8.")
        size, found = _HEADER.size + 12 * sequences + 8 * boundaries, path.stat().st_size
        if found != size:
            raise ValueError(f"{path} has {found} bytes, its header says {size}: cut off? Build it again.")
        return code, sequences, boundaries

    def _check_sequences(self) -> int:
        """Raise a ValueError unless each sequence begins where the one before it ends; return where the last one ends."""
        end = first = 0
        for lengths, pointers in zip(self.chunks("lengths"), self.chunks("pointers"), strict=True):
            sizes = lengths * np.int64(self.dtype.itemsize)
            starts = end + np.cumsum(sizes) - sizes
            if len(wrong := np.flatnonzero((lengths < 0) | (pointers != starts))):
                i = wrong[0]
                raise ValueError(
                    f"{self._index_path} is damaged: sequence {first + i} has {lengths[i]} tokens from byte {pointers[i]} on, "
                    f"the ones before it end at byte {starts[i]}. Build it again."
                )
            end, first = int(starts[-1] + sizes[-1]), first + len(lengths)
        return end

    def _check_documents(self) -> None:
        """Raise a ValueError unless the documents' starts rise from 0 to the number of sequences."""
        last, first = 0, 0
        for starts in self.chunks("document_indices"):
            if first == 0 and starts[0] != 0:
                raise ValueError(
                    f"{self._index_path} is damaged: its first document starts at sequence {starts[0]}. Build it again."
                )
            if len(wrong := np.flatnonzero(np.diff(starts, prepend=last) < 0)):
                before = starts[wrong[0] - 1] if wrong[0] else last
                raise ValueError(
                    f"{self._index_path} is damaged: document {first + wrong[0]} starts at sequence {starts[wrong[0]]}, the "
                    f"one before it at {before}. Build it again."
                )
            last, first = int(starts[-1]), first + len(starts)
        if first == 0 or last != len(self):
            raise ValueError(
                f"{self._index_path} is damaged: its documents end at sequence {last} of {len(self)}. Build it again."
            )
