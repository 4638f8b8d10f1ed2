"""The interface between a corpus and its users: training samples by index, and tokens for evaluation.

`PileDataModule` reads any `Corpus`; `pocket_pile.py`, `megatron_indexed.py`, `streaming/` and `blend.py` implement one each.
"""

import errno
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock, Timeout

from nlgmoe.data.description import Description
from nlgmoe.data.sources import PackedSource, TokenSource
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.validation import SettingError, require

WAITING_SECONDS = 3.0  # for another process that builds, before a message


class OpenCorpus(Protocol):
    """A corpus that can be read."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the tokens."""
        ...

    @property
    def domains(self) -> list[str]:
        """Names; a batch's domain ids index them."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the training tokens."""
        ...

    @property
    def description(self) -> Description:
        """Description of the training tokens' sources; messages about a changed fingerprint name what differs here."""
        ...

    def training_source(self, seq_len: int, seed: int) -> TokenSource:
        """Training samples of `seq_len` tokens, without end; `seed` decides their order."""
        ...

    def training_tokens(self) -> Sequence[np.ndarray]:
        """Tokens of each domain's training text, `[N_d]` each, or of a representative part: for statistics."""
        ...

    def evaluation_tokens(self, split: str) -> Sequence[np.ndarray] | None:
        """Tokens of each domain in the form of `packing.py`, `[N_d]` each; None if there is no such split.

        Args:
            split: "validation", which every corpus has, or "test".
        """
        ...


@dataclass(frozen=True)
class Streams:
    """An open corpus whose tokens lie in arrays, memory-mapped or not.

    Args:
        tokenizer: of the tokens.
        domains: names; a batch's domain ids index them.
        tokens: split -> tokens of each domain, each [N_d], in the form of `packing.py`: every document closed by the
            end-of-document token. Has "train" and "validation"; has "test" where the corpus has one.
        fingerprint: hash of everything that determines the training tokens.
        facts: of each domain's training text beside its tokens, for `description`.
    """

    tokenizer: Tokenizer
    domains: list[str]
    tokens: Mapping[str, Sequence[np.ndarray]]
    fingerprint: str
    facts: Description = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values, which a user's code may pass."""
        require(
            isinstance(self.tokenizer, Tokenizer),
            f"Streams.tokenizer is {self.tokenizer!r}; give what load_tokenizer returns",
        )
        require(
            {"train", "validation"} <= self.tokens.keys(),
            f"Streams.tokens has {[*self.tokens]}; give train and validation",
        )
        for split, arrays in self.tokens.items():
            require(
                len(arrays) == len(self.domains),
                f"Streams.tokens has {len(arrays)} arrays of {split} for the domains {self.domains}; give one for each",
            )
            integers = all(isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.integer) for array in arrays)
            require(
                integers, f"Streams.tokens has no array of token ids in {split}; give numpy arrays of an integer type"
            )
        texts = {split: sum(map(len, arrays)) for split, arrays in self.tokens.items()}
        require(
            texts["validation"] > 0 or not texts["train"],
            "Streams.tokens has no token of validation; give some text for it",
        )

    @property
    def description(self) -> Description:
        """Tokens and facts of each domain."""
        sizes = zip(self.domains, self.tokens["train"], strict=True)
        return {domain: {"tokens": len(tokens), **self.facts.get(domain, {})} for domain, tokens in sizes}

    def training_source(self, seq_len: int, seed: int) -> TokenSource:
        """Return the windows of all domains, in a new random order every epoch."""
        return PackedSource(self.tokens["train"], seq_len, self.tokenizer.eod_id, seed)

    def training_tokens(self) -> Sequence[np.ndarray]:
        """Return all training tokens."""
        return self.tokens["train"]

    def evaluation_tokens(self, split: str) -> Sequence[np.ndarray] | None:
        """See `OpenCorpus`."""
        return self.tokens.get(split)


class Corpus(Protocol):
    """Tokenised text on disk. The constructor reads no files; `prepare` and `open` do.

    Both get the data folder, where tokenizers are kept, and a tokenizer by name or folder (`load_tokenizer`).
    """

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Build what is missing of tokenizer and corpus; one process a node."""
        ...

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Load the tokenizer and make the tokens readable; every process.

        Raises:
            ValueError: the corpus is missing, damaged, or not of this tokenizer.
        """
        ...


@contextmanager
def build_lock(data_dir: Path) -> Iterator[None]:
    """Make the folder, and let one process at a time build in it.

    A user who may not write there needs no lock: if something is missing, writing it raises the error.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise SettingError(f"data_dir={data_dir} is no folder; give one") from error
    lock = FileLock(data_dir / ".lock")
    try:
        try:
            lock.acquire(timeout=WAITING_SECONDS)
        except Timeout:
            print(f"waiting for another process, which builds in {data_dir}", file=sys.stderr, flush=True)
            lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    try:
        yield
    finally:
        lock.release()
