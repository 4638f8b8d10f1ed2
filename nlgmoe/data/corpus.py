"""The seam between a corpus and what is done with it: training samples by their number, and tokens to evaluate on.

`PileDataModule` reads any `Corpus`. Here is the pocket Pile's; `megatron_indexed.py` has Megatron's indexed format.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from nlgmoe.data.description import Description
from nlgmoe.data.pocket.pocket_pile import SPLITS, read_manifest
from nlgmoe.data.pocket.prepare import prepare
from nlgmoe.data.pocket.shards import open_shard, read_shards
from nlgmoe.data.sources import PackedSource, TokenSource
from nlgmoe.data.tokenizer import Tokenizer, load_tokenizer


class OpenCorpus(Protocol):
    """A corpus that can be read."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Whose ids the tokens are."""
        ...

    @property
    def domains(self) -> list[str]:
        """Names; a batch's domain ids index them."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the training tokens."""
        ...

    @property
    def description(self) -> Description:
        """What the training tokens are made of; a change of the fingerprint is named by what differs here."""
        ...

    def training_source(self, seq_len: int, seed: int) -> TokenSource:
        """Training samples of `seq_len` tokens, without end; `seed` decides their order."""
        ...

    def training_tokens(self) -> Sequence[np.ndarray]:
        """Tokens of each domain's training text, `[N_d]` each, or of a part of it that stands for it: for statistics."""
        ...

    def evaluation_tokens(self, split: str) -> Sequence[np.ndarray] | None:
        """Tokens of each domain, as `packing.py` wants them, `[N_d]` each; None if there is no such split.

        Args:
            split: "validation", which every corpus has, or "test".
        """
        ...


@dataclass(frozen=True)
class Streams:
    """An open corpus whose tokens lie in arrays, memory-mapped or not.

    Args:
        tokenizer: whose ids the tokens are.
        domains: names; a batch's domain ids index them.
        tokens: split -> tokens of each domain, as `packing.py` wants them: every document closed by the end-of-document
            token, each [N_d]. Has "train" and "validation"; has "test" where the corpus has one.
        fingerprint: of everything that decides the training tokens.
        facts: of each domain's training text beside its tokens, for `description`.
    """

    tokenizer: Tokenizer
    domains: list[str]
    tokens: Mapping[str, Sequence[np.ndarray]]
    fingerprint: str
    facts: Description = field(default_factory=dict)

    @property
    def description(self) -> Description:
        """Tokens and facts of each domain."""
        sizes = zip(self.domains, self.tokens["train"], strict=True)
        return {domain: {"tokens": len(tokens), **self.facts.get(domain, {})} for domain, tokens in sizes}

    def training_source(self, seq_len: int, seed: int) -> TokenSource:
        """The windows of all domains, in a new random order every epoch."""
        return PackedSource(self.tokens["train"], seq_len, self.tokenizer.eod_id, seed)

    def training_tokens(self) -> Sequence[np.ndarray]:
        """All of them."""
        return self.tokens["train"]

    def evaluation_tokens(self, split: str) -> Sequence[np.ndarray] | None:
        """See `OpenCorpus`."""
        return self.tokens.get(split)


class Corpus(Protocol):
    """Tokenised text on disk. Making one touches no file: that is for `prepare` and `open`.

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


class PocketPile:
    """The corpus in `data_dir`, tokenised there once: the pocket Pile, or one that `write_corpus` put there.

    Args:
        domains: which of its domains to read, in this order; None: all.

    Raises:
        ValueError: `domains` is empty, or names one twice.
    """

    def __init__(self, domains: list[str] | None = None) -> None:
        if domains is not None and (not domains or len(set(domains)) < len(domains)):
            raise ValueError(f"domains={domains} must name one domain or several, each once; leave it out for all.")
        self._domains = domains

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Build what is missing of text, tokenizer and shards, of all domains."""
        prepare(data_dir, tokenizer)

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Map the shards of a tokenizer.

        Raises:
            ValueError: there is no corpus, it is not tokenised with this tokenizer, or it has no such domain.
        """
        manifest = read_manifest(data_dir)
        if manifest is None:
            raise ValueError(f"No corpus in {data_dir}: run `nlgmoe prepare-data --data_dir {data_dir}` first.")
        domains = manifest.domains if self._domains is None else self._domains
        if unknown := sorted(set(domains) - set(manifest.domains)):
            raise ValueError(
                f"domains={self._domains}: {data_dir} has no {unknown[0]}; choose from {', '.join(manifest.domains)}."
            )
        loaded = load_tokenizer(tokenizer, data_dir)
        shards = read_shards(data_dir, loaded)
        for name, file in manifest.files.items():
            if name not in shards or shards[name].text_sha256 != file.sha256:
                raise ValueError(
                    f"{name} in {data_dir} is not tokenised with {tokenizer}: run `nlgmoe prepare-data "
                    f"--data_dir {data_dir} --tokenizer {tokenizer}` first."
                )
        tokens = {split: [open_shard(data_dir, loaded, f"{domain}.{split}") for domain in domains] for split in SPLITS}
        files = {domain: manifest.files[f"{domain}.train"] for domain in domains}
        fingerprint = hashlib.sha256(" ".join(file.sha256 for file in files.values()).encode()).hexdigest()[:16]
        facts: Description = {
            domain: {"documents": file.documents, "text": file.sha256[:16]} for domain, file in files.items()
        }
        return Streams(loaded, list(domains), tokens, fingerprint, facts)
