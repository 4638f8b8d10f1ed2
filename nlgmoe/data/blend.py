"""Weighted blends: several corpora as one. `interleaving.py` computes part and sample from a sample's index."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info

from nlgmoe.data.corpus import Corpus, OpenCorpus
from nlgmoe.data.description import Description, description_of
from nlgmoe.data.interleaving import Interleaving, integer_weights
from nlgmoe.data.sources import CursorSource, Sample, TokenSource
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.seeding import derive_seed
from nlgmoe.validation import SettingError

SMALLEST_SHARE = 1e-9  # 300 billion tokens are 146 million samples of 2,048


@dataclass(frozen=True)
class BlendPart:
    """A corpus and its share of a blend.

    Args:
        weight: share of the training samples as a weight in any unit; weights need not sum to 1.
        name: name of the part in the logs, such as `val/loss/NAME`.
        corpus: any corpus, including a blend, by class_path and init_args.
    """

    weight: float
    name: str
    corpus: Corpus


class Blend:
    """A weighted blend of corpora: at any point of training, each part's number of samples is its share to within two.

    An exhausted part starts again in another order. Domains are named after the parts, `PART/DOMAIN` where a part
    has several. Validation covers every domain's text, whatever its weight; the test split covers the parts that have one.

    Args:
        parts: parts of the blend, each with `weight`, `name` and `corpus` (class_path and init_args).

    Raises:
        ValueError: there is no part, a weight is not above 0 or below a billionth of all, or a name is missing or used twice.
    """

    def __init__(self, parts: list[BlendPart]) -> None:
        if not parts:
            raise SettingError("parts=[] is empty: give each corpus as {weight: ..., name: ..., corpus: ...}.")
        for part in parts:
            if not (math.isfinite(part.weight) and part.weight > 0):
                raise SettingError(
                    f"weight={part.weight} of the part {part.name!r} must be a number above 0: raise it, or remove the part."
                )
            if sum(other.name == part.name for other in parts) > 1 or not part.name:
                raise SettingError(f"name={part.name} is empty or used twice: losses are logged by it, change it.")
        lightest = min(parts, key=lambda part: part.weight)
        if lightest.weight < SMALLEST_SHARE * sum(part.weight for part in parts):
            raise SettingError(
                f"weight={lightest.weight} of the part {lightest.name!r} is less than a billionth of all weights, so that no "
                "run reads it: raise it, or remove the part."
            )
        self.parts = list(parts)

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Prepare every part.

        Raises:
            ValueError: a part cannot be prepared.
        """
        for part in self.parts:
            with _naming(part.name):
                part.corpus.prepare(data_dir, tokenizer)

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Open every part.

        Raises:
            ValueError: a part cannot be opened, its tokens are another tokenizer's than the first part's, or two domains would
                have one name.
        """
        opened = []
        for part in self.parts:
            with _naming(part.name):
                opened.append(part.corpus.open(data_dir, tokenizer))
        return OpenBlend(self.parts, opened)


class _Part(NamedTuple):
    name: str
    weight: int
    corpus: OpenCorpus


class OpenBlend:
    """A blend that can be read.

    Args:
        parts: weights and names.
        opened: the parts' corpora.
    """

    def __init__(self, parts: Sequence[BlendPart], opened: Sequence[OpenCorpus]) -> None:
        names, self.weights = [part.name for part in parts], integer_weights([part.weight for part in parts])
        self._parts = [_Part(*part) for part in zip(names, self.weights, opened, strict=True)]
        self.tokenizer: Tokenizer = opened[0].tokenizer
        self.domains: list[str] = []
        self.description: Description = {}
        for name, weight, corpus in self._parts:
            if corpus.tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise SettingError(
                    f"The part {name!r} is tokenised with {corpus.tokenizer.name}, {names[0]!r} with "
                    f"{self.tokenizer.name}: give the parts of a blend one tokenizer."
                )
            self.domains += [f"{name}/{domain}" for domain in corpus.domains] if len(corpus.domains) > 1 else [name]
            facts = description_of(corpus)
            share: dict[str, str | int] = {"share": str(Fraction(weight, sum(self.weights)))}
            if len(facts) == 1:
                share |= next(iter(facts.values()))
            else:
                self.description |= {f"{name}/{inner}": inner_facts for inner, inner_facts in facts.items()}
            self.description[name] = share
        if duplicates := {name for name in self.domains if self.domains.count(name) > 1}:
            raise SettingError(f"two domains of the blend are called {min(duplicates)}; change the name of a part")
        described = [(name, weight, corpus.fingerprint) for name, weight, corpus in self._parts]
        self.fingerprint = hashlib.sha256(repr(described).encode()).hexdigest()[:16]

    @property
    def shares(self) -> list[float]:
        """Share of each domain in the training samples, `[D]`; within a part as its training tokens."""
        shares: list[float] = []
        for _, weight, corpus in self._parts:
            sizes: Sequence[float]
            sizes = corpus.shares if isinstance(corpus, OpenBlend) else [len(t) for t in corpus.training_tokens()]
            shares += [weight / sum(self.weights) * size / sum(sizes) for size in sizes]
        return shares

    def training_source(self, seq_len: int, seed: int) -> TokenSource:
        """Return the parts' samples in turn, each part with a seed of its own; log how often each part is repeated."""
        sources = []
        for name, weight, corpus in self._parts:
            with _naming(name):
                source = corpus.training_source(seq_len, derive_seed(seed, name))
            share, windows = weight / sum(self.weights), getattr(source, "num_windows", None)
            epoch = (
                f", used up every {round(windows * source.seq_len / share):,} tokens of the blend" if windows else ""
            )
            rank_zero_info(f"blend: {name} has {share:.2%} of the samples{epoch}")
            sources.append(source)
        return BlendedSource(sources, self.weights, [len(part.corpus.domains) for part in self._parts])

    def training_tokens(self) -> Sequence[np.ndarray]:
        """Return those of all parts, not in the blend's shares."""
        return [tokens for part in self._parts for tokens in part.corpus.training_tokens()]

    def evaluation_tokens(self, split: str) -> Sequence[np.ndarray] | None:
        """Return those of all parts; none for the domains of a part without such a split, None if no part has it."""
        streams_of_parts = [part.corpus.evaluation_tokens(split) for part in self._parts]
        if all(streams is None for streams in streams_of_parts):
            return None
        nothing = np.zeros(0, dtype=np.int64)
        return [
            stream
            for streams, part in zip(streams_of_parts, self._parts, strict=True)
            for stream in ([nothing] * len(part.corpus.domains) if streams is None else streams)
        ]


class BlendedSource:
    """Training samples of several sources, interleaved by weight.

    It is a `CursorSource` for the parts that are one; stream s of part p, of P parts, is stream s P + p of the blend.

    Args:
        sources: of the parts; without end, all of one sequence length.
        weights: of the parts, whole numbers above 0.
        domains: number of domains of each part; a blended sample's domain counts through them.
    """

    def __init__(self, sources: Sequence[TokenSource], weights: Sequence[int], domains: Sequence[int]) -> None:
        self.seq_len = sources[0].seq_len
        self._sources = list(sources)
        self._interleaving = Interleaving(weights)
        self._first_domains = [sum(domains[:part]) for part in range(len(sources))]
        self._streamed = {
            part: source
            for part, source in enumerate(sources)
            if isinstance(source, CursorSource) and source.cursor_length
        }
        self.cursor_length = max((source.cursor_length for source in self._streamed.values()), default=0)

    def seek(self, cursors: Sequence[Sequence[int]]) -> None:
        """See `CursorSource`."""
        for part, source in self._streamed.items():
            source.seek(self._of_part(part, cursors))

    def reading_warning(self, micro_batch_size: int, world_size: int, num_workers: int) -> str | None:
        """See `CursorSource`."""
        processes = world_size * max(1, num_workers)
        if not self._streamed or processes == 1:
            return None
        return (
            f"each of the {processes} processes that load data reads and tokenises all streamed parts of a blend: tokenise these "
            "parts once, with `nlgmoe prepare-data --input`"
        )

    def skipped_summary(self, cursors: Sequence[Sequence[int]]) -> str | None:
        """See `CursorSource`."""
        summaries = [source.skipped_summary(self._of_part(part, cursors)) for part, source in self._streamed.items()]
        return "; ".join(summary for summary in summaries if summary) or None

    def sample(self, index: int) -> Sample:
        """Return the next sample of the part that `Interleaving` names."""
        part, own_index = self._interleaving.place(index)
        sample = self._sources[part].sample(own_index).copy()
        sample["domain"] = sample["domain"] + self._first_domains[part]
        if self.cursor_length:
            cursor = torch.full((self.cursor_length,), -1)
            if "cursor" in sample:
                cursor[: len(sample["cursor"])] = sample["cursor"]
                cursor[0] = cursor[0] * len(self._sources) + part if cursor[0] >= 0 else -1
            sample["cursor"] = cursor
        return sample

    def _of_part(self, part: int, cursors: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the cursors of a part's streams, as the part made them."""
        parts, length = len(self._sources), self._streamed[part].cursor_length
        return [[stream // parts, *rest[: length - 1]] for stream, *rest in cursors if stream % parts == part]


@contextmanager
def _naming(part: str) -> Iterator[None]:
    """Name the part in its errors."""
    try:
        yield
    except ValueError as error:
        kind = SettingError if isinstance(error, SettingError) else ValueError
        raise kind(f"In the part {part!r} of the blend: {error}") from error
