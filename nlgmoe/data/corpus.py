"""The interface between a corpus and its users: training samples by index, and tokens for evaluation.

`PileDataModule` reads any `Corpus`: `PocketPile`, `MegatronIndexed`, `StreamedText`, `Blend`, or a user's.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock, Timeout
from fsspec.core import url_to_fs

from nlgmoe.data.samples import PackedSource, TokenSource
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokens import Tokens
from nlgmoe.validation import require

WAITING_SECONDS = 3.0  # of waiting for a build by another process, before a message
HASHED_PIECES, HASHED_BYTES = 64, 1 << 15  # of a file: number, and length of each

Fingerprint = dict[str, str | int]
"""Name -> setting or hash of contents. Equal ones mean the same training tokens; an error names the entries that differ."""


@dataclass(frozen=True)
class OpenCorpus:
    """A corpus that can be read: its tokens lie in arrays, memory-mapped or not.

    Where the training samples are no windows of `tokens`, a class of its own overrides `training_source`; "train" then has a
    representative part of the training text, for statistics.
    """

    tokenizer: Tokenizer
    domains: list[str]  # names, indexed by a batch's domain ids
    # Split -> tokens of each domain, each [N_d], in the form of `samples.py`: every document closed by the end-of-document token.
    # Has "train" and "validation"; has "test" where the corpus has one.
    tokens: Mapping[str, Sequence[Tokens]]
    fingerprint: Fingerprint  # settings and hashes that determine the training tokens, such as `{"lines.txt": sha256}`

    def __post_init__(self) -> None:
        """Check the values, which may come from user code."""
        known = {"train", "validation"} <= self.tokens.keys()
        require(known, f"OpenCorpus.tokens has {[*self.tokens]}; give train and validation")
        for split, arrays in self.tokens.items():
            integers = all(np.issubdtype(array.dtype, np.integer) for array in arrays)  # floats would be truncated
            given = f"{[f'{array.dtype} [{len(array)}]' for array in arrays]} for {split}"
            remedy = f"give an array of integers for each of the domains {self.domains}"
            require(integers and len(arrays) == len(self.domains), f"OpenCorpus.tokens has {given}; {remedy}")
        evaluates = any(map(len, self.tokens["validation"]))
        require(evaluates, "OpenCorpus.tokens has no token of validation; give some text for it")

    def training_source(self, seq_len: int, seed: int) -> TokenSource:
        """Return endless training samples of `seq_len` tokens; `seed` determines their order."""
        return PackedSource(self.tokens["train"], seq_len, self.tokenizer.eod_id, seed)


class Corpus(Protocol):
    """Tokenised text on disk. The constructor reads no files; `prepare` and `open` do.

    Both get the data folder, where tokenizers are kept, and a tokenizer by name or folder (`load_tokenizer`). A corpus may have
    a method `own_tokenizer` that returns the tokenizer to use if `data.tokenizer` is null.
    """

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Build tokenizer and corpus if missing; called by one process per node."""

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Load the tokenizer and make the tokens readable; called by every process.

        Raises:
            ValueError: the corpus is missing, damaged, or not of this tokenizer.
        """


def own_tokenizer(corpus: Corpus) -> str | None:
    """Return the tokenizer that a corpus names by a method `own_tokenizer`; None: it names none."""
    name: str | None = getattr(corpus, "own_tokenizer", lambda: None)()
    return name


@contextmanager
def build_lock(data_dir: Path) -> Iterator[None]:
    """Create the folder, and lock it: one process at a time builds in it.

    Where there is no lock, without write permission or on some file systems, none is waited for: prepare the data there by one
    process, before the run.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(data_dir / ".lock")
    try:
        try:
            lock.acquire(timeout=WAITING_SECONDS)
        except Timeout:
            print(f"waiting for another process, which builds in {data_dir}", file=sys.stderr, flush=True)
            lock.acquire()
    except OSError:
        pass
    try:
        yield
    finally:
        lock.release()


def hash_of(facts: object) -> str:
    """Hash the representation of settings, 16 hexadecimal digits."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def hash_of_pieces(path: str | Path, pieces: int = HASHED_PIECES) -> str:
    """Hash the size of a file and evenly spaced pieces of it, the first and last bytes included; 16 hexadecimal digits.

    A copy has the same hash. An edit between the pieces that keeps the size is not detected.

    Args:
        path: local, or an address that fsspec opens.
        pieces: number of pieces, at least 2, of 32 KB each; a shorter file is hashed whole.
    """
    file_system, name = url_to_fs(str(path))
    size = int(file_system.info(name)["size"])
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    length = min(HASHED_BYTES, size)
    with file_system.open(name, "rb") as handle:
        for start in np.unique(np.linspace(0, size - length, pieces, dtype=np.int64)).tolist():
            handle.seek(start)
            digest.update(handle.read(length))
    return digest.hexdigest()[:16]
