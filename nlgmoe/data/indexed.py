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

Megatron's tools and this module read each other's files. Memory does not grow with the corpus: the Pile's index alone has 4 GB.
"""

import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from nlgmoe.data.prefix import Sidecar
from nlgmoe.validation import RunError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK = 1 << 18  # entries of an index in memory at a time
HEADER = struct.Struct("<9sQBQQ")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype in which Megatron stores tokens of a vocabulary of this size."""
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

    Opening checks headers, sizes and the ends of the index; `check` reads all of it.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index_path, bin_path):
            if not path.exists():
                raise RunError(f"{path} is missing. An indexed dataset is two files, .bin and .idx: copy both.")
        code, sequences, boundaries = _read_header(index_path)
        self.dtype = np.dtype(DTYPES[code])
        index = np.memmap(index_path, np.uint8, mode="r")
        self.lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
        self.pointers = np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences)
        self.document_indices = np.frombuffer(index, "<i8", boundaries, HEADER.size + 12 * sequences)
        expected = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if (size := bin_path.stat().st_size) != expected:
            self.check()
            raise RunError(f"{bin_path} has {size} bytes, {index_path} says {expected}: cut off? Build it again.")
        # An empty file cannot be mapped.
        self.tokens = np.memmap(bin_path, self.dtype, mode="r") if size else np.zeros(0, self.dtype)
        ends = self.document_indices[[0, -1]].tolist() if boundaries else []
        if ends != [0, sequences]:
            self._refuse_documents()

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    def first_token(self, document: int) -> int:
        """Return the index in `tokens` at which a document starts; for the number of documents, the length of `tokens`."""
        sequence = int(self.document_indices[document])
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < len(self) else len(self.tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    def check(self) -> None:
        """Check each length, offset and document of the index."""
        end = 0
        for first in range(0, len(self), CHUNK):
            lengths, pointers = self.lengths[first : first + CHUNK], self.pointers[first : first + CHUNK]
            sizes = lengths * np.int64(self.dtype.itemsize)
            starts = end + np.cumsum(sizes) - sizes
            if len(wrong := np.flatnonzero((lengths < 0) | (pointers != starts))):
                i = wrong[0]
                damage = f"sequence {first + i} has {lengths[i]} tokens from byte {pointers[i]} on"
                damage += f", the ones before it end at byte {starts[i]}"
                raise RunError(f"{self.prefix}.idx is damaged: {damage}. Build it again.")
            end = int(starts[-1] + sizes[-1])
        documents = self.document_indices
        parts = (documents[first : first + CHUNK + 1] for first in range(0, len(documents), CHUNK))
        if not all((np.diff(part) >= 0).all() for part in parts):
            self._refuse_documents()

    def _refuse_documents(self) -> None:
        damage = f"its documents do not rise from sequence 0 to {len(self)}"
        raise RunError(f"{self.prefix}.idx is damaged: {damage}. Build it again.")


def _read_header(path: Path) -> tuple[int, int, int]:
    """Return the code of the token type and the numbers of sequences and of document boundaries."""
    with path.open("rb") as handle:
        header = handle.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise RunError(f"{path} does not start with {MAGIC!r}: not the index of an indexed dataset.")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != VERSION or code not in DTYPES:
        known = f"known are version 1 and integers, codes {', '.join(map(str, DTYPES))}"
        raise RunError(f"{path} has version {version} and type code {code}; {known}.")
    expected, size = HEADER.size + 12 * sequences + 8 * boundaries, path.stat().st_size
    if size != expected:
        raise RunError(f"{path} has {size} bytes, its header says {expected}: cut off? Build it again.")
    return code, sequences, boundaries


class IndexedWriter:
    """Write documents of one sequence each; the files appear when the `with` block ends without an error.

    At any time PREFIX.idx exists only if all files are complete and of one corpus.

    Args:
        prefix: path without `.bin` / `.idx`.
        dtype: type of the stored tokens, one of `DTYPES`.
        folder: folder of unfinished files, on the same file system; kept after an error. None: a temporary folder.

    Attributes:
        sidecar: set before the block ends: facts of PREFIX.json, to which the writer adds the counts, and `xxh3` if the hash
            of the text is given; None: there is no such file.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, folder: Path | None = None) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._code = {np.dtype(known): code for code, known in DTYPES.items()}[self._dtype]
        self._keep = folder is not None
        self.sidecar: Sidecar | None = None
        self._folder = folder or Path(tempfile.mkdtemp(prefix=f"{prefix.name}.building.", dir=prefix.parent))
        # An index begins with counts that are known only at the end; until then its parts are files.
        self._files = {kind: (self._folder / kind).open("w+b") for kind in ("bin", "lengths")}

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document."""
        array = np.asarray(tokens)
        stored = array.astype(self._dtype)
        if not np.array_equal(stored, array):
            raise RunError(f"A token does not fit {self._dtype}: ids reach {array.max()}. Use a wider dtype.")
        self._files["bin"].write(stored.tobytes())
        self._files["lengths"].write(len(stored).to_bytes(4, "little"))

    def append(self, other: "IndexedWriter") -> None:
        """Append the documents of an unfinished writer of the same type of tokens."""
        for kind, file in other._files.items():
            file.seek(0)
            shutil.copyfileobj(file, self._files[kind], 8 * CHUNK)

    def lengths(self) -> np.ndarray:
        """Return the tokens of each sequence written so far, int32 [S]."""
        self._files["lengths"].flush()
        return np.fromfile(self._folder / "lengths", "<i4")

    def close(self) -> None:
        """Close the unfinished files, which stay in their folder."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._files["bin"].flush()
                os.fsync(self._files["bin"].fileno())
                self._write_index()
                self._write_sidecar()
                for name in ("idx", "json"):
                    Path(f"{self._prefix}.{name}").unlink(missing_ok=True)
                for name in ("bin", "json", "idx") if self.sidecar else ("bin", "idx"):
                    (self._folder / name).replace(f"{self._prefix}.{name}")
        finally:
            self.close()
            if not self._keep:
                shutil.rmtree(self._folder)

    def _write_sidecar(self) -> None:
        if self.sidecar is None:
            return
        xxh3 = None
        if self.sidecar.text is not None:
            xxh3 = xxhash.xxh3_64_hexdigest(np.memmap(self._folder / "bin", np.uint8, mode="r").data)
        documents, tokens = self._files["lengths"].tell() // 4, self._files["bin"].tell() // self._dtype.itemsize
        replace(self.sidecar, documents=documents, tokens=tokens, xxh3=xxh3).write(self._folder / "json")

    def _write_index(self) -> None:
        lengths, item = self._files["lengths"], np.int64(self._dtype.itemsize)
        documents = lengths.tell() // 4
        with (self._folder / "idx").open("wb") as handle:
            handle.write(HEADER.pack(MAGIC, VERSION, self._code, documents, documents + 1))
            lengths.seek(0)
            shutil.copyfileobj(lengths, handle, 8 * CHUNK)
            lengths.seek(0)
            position = 0
            while len(sizes := np.frombuffer(lengths.read(4 * CHUNK), "<i4") * item):
                stops = position + np.cumsum(sizes)
                handle.write((stops - sizes).astype("<i8").tobytes())
                position = int(stops[-1])
            for first in range(0, documents + 1, CHUNK):
                handle.write(np.arange(first, min(first + CHUNK, documents + 1), dtype="<i8").tobytes())
            handle.flush()
            os.fsync(handle.fileno())
