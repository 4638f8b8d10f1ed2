"""Writer of Megatron's indexed format, see `indexed.py`."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from nlgmoe.data.indexed import CHUNK, DTYPES, HEADER, MAGIC, VERSION
from nlgmoe.validation import RunError


class IndexedWriter:
    """Write documents; both files appear when the `with` block ends without an error.

    Args:
        prefix: path without `.bin` / `.idx`.
        dtype: type of the stored tokens, one of `DTYPES`.
        folder: for unfinished files, on the same file system; kept after an error. None: a temporary one.
        sizes: result of `position`: resume there, with the files in `folder`.

    Raises:
        ValueError: a file in `folder` is missing, or shorter than in `sizes`.
    """

    def __init__(
        self, prefix: Path, dtype: np.dtype, folder: Path | None = None, sizes: Mapping[str, int] | None = None
    ) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._code = {np.dtype(known): code for code, known in DTYPES.items()}[self._dtype]
        self._keep = folder is not None
        self._folder = folder or Path(tempfile.mkdtemp(prefix=f"{prefix.name}.building.", dir=prefix.parent))
        # An index begins with counts that are known only at the end; until then its parts are files.
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
            raise RunError(f"A token does not fit {self._dtype}: ids reach {array.max()}. Use a wider dtype.")
        counts = [len(stored)] if lengths is None else lengths
        assert sum(counts) == len(stored), f"sequences of {sum(counts)} tokens in a document of {len(stored)}"
        self._files["bin"].write(stored.tobytes())
        self._files["lengths"].write(np.asarray(counts, dtype="<i4").tobytes())
        self._sequences += len(counts)
        self._files["ends"].write(self._sequences.to_bytes(8, "little"))

    def position(self) -> dict[str, int]:
        """Flush to disk; returns the size of each file in bytes."""
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
                # At any time the index fits the tokens, or does not exist.
                Path(f"{self._prefix}.idx").unlink(missing_ok=True)
                (self._folder / "bin").replace(f"{self._prefix}.bin")
                (self._folder / "idx").replace(f"{self._prefix}.idx")
        finally:
            for file in self._files.values():
                file.close()
            if kind is None or not self._keep:
                shutil.rmtree(self._folder)

    def _open(self, kind: str, sizes: Mapping[str, int] | None) -> BinaryIO:
        path = self._folder / kind
        if sizes is None:
            return path.open("w+b")
        if kind == "bin" and not path.exists() and Path(f"{self._prefix}.bin").exists():
            Path(f"{self._prefix}.bin").replace(path)  # the process was killed after it was moved
        if not path.exists() or path.stat().st_size < sizes[kind]:
            raise RunError(f"{path} is missing or cut off: delete {self._folder} to begin again.")
        file = path.open("r+b")
        file.truncate(sizes[kind])
        file.seek(0, os.SEEK_END)
        return file

    def _write_index(self) -> None:
        lengths, ends, item = self._files["lengths"], self._files["ends"], np.int64(self._dtype.itemsize)
        with (self._folder / "idx").open("wb") as handle:
            handle.write(HEADER.pack(MAGIC, VERSION, self._code, self._sequences, ends.tell() // 8 + 1))
            lengths.seek(0)
            shutil.copyfileobj(lengths, handle, 8 * CHUNK)
            lengths.seek(0)
            position = 0
            while len(sizes := np.frombuffer(lengths.read(4 * CHUNK), "<i4") * item):
                stops = position + np.cumsum(sizes)
                handle.write((stops - sizes).astype("<i8").tobytes())
                position = int(stops[-1])
            handle.write(bytes(8))  # the first document starts at sequence 0
            ends.seek(0)
            shutil.copyfileobj(ends, handle, 8 * CHUNK)
            handle.flush()
            os.fsync(handle.fileno())
