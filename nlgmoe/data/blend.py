"""Weighted blends: several corpora as one. `Interleaving` computes part and sample from a sample's index."""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from nlgmoe.data.corpus import Corpus, Fingerprint, OpenCorpus, own_tokenizer
from nlgmoe.data.samples import Sample, TokenSource
from nlgmoe.data.tokens import Tokens
from nlgmoe.seeding import derive_seed
from nlgmoe.validation import SettingError, require


@dataclass(frozen=True)
class BlendPart:
    """A corpus and its share of a blend.

    Args:
        weight: share of the training samples as a weight in any unit; weights need not sum to 1.
        name: name of the part in the logs, such as `val/loss/NAME`.
        corpus: any corpus but a stream, also a blend, by class_path and init_args.
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
    """

    def __init__(self, parts: list[BlendPart]) -> None:
        require(bool(parts), "parts=[] is empty: give each corpus as {weight: ..., name: ..., corpus: ...}.")
        names = [part.name for part in parts]
        for part in parts:
            weighs = 0 < part.weight < math.inf
            require(weighs, f"weight={part.weight} of the part {part.name!r} must be a number above 0; change it.")
            unique = part.name != "" and names.count(part.name) == 1
            require(unique, f"name={part.name} is empty or used twice: losses are logged by it, change it.")
        self.parts = list(parts)

    def own_tokenizer(self) -> str | None:
        """Return that of the first part that has one."""
        return next((found for part in self.parts if (found := own_tokenizer(part.corpus))), None)

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Prepare every part."""
        for part in self.parts:
            part.corpus.prepare(data_dir, tokenizer)

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Open every part, and check that tokenizers agree and names of domains differ."""
        opened = [part.corpus.open(data_dir, tokenizer) for part in self.parts]
        weights = integer_weights([part.weight for part in self.parts])
        names = [part.name for part in self.parts]
        return OpenBlend.of([_Part(*part) for part in zip(names, weights, opened, strict=True)])


class _Part(NamedTuple):
    name: str
    weight: int
    corpus: OpenCorpus


@dataclass(frozen=True)
class OpenBlend(OpenCorpus):
    """A blend that can be read; a part has empty arrays for a split that it lacks."""

    parts: Sequence[_Part]

    @classmethod
    def of(cls, parts: Sequence[_Part]) -> "OpenBlend":
        """Join open parts."""
        tokenizer, total = parts[0].corpus.tokenizer, sum(part.weight for part in parts)
        fingerprint: Fingerprint = {"parts": ", ".join(f"{part.name} {Fraction(part.weight, total)}" for part in parts)}
        domains: list[str] = []
        for name, _, corpus in parts:
            if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
                problem = f"The part {name!r} is tokenised with {corpus.tokenizer.name}, {parts[0].name!r} with"
                raise SettingError(f"{problem} {tokenizer.name}: give the parts of a blend one tokenizer.")
            domains += [f"{name}/{domain}" for domain in corpus.domains] if len(corpus.domains) > 1 else [name]
            fingerprint |= {f"{name}/{entry}": value for entry, value in corpus.fingerprint.items()}
        if duplicates := {name for name in domains if domains.count(name) > 1}:
            raise SettingError(f"two domains of the blend are called {min(duplicates)}; change the name of a part")
        tokens: dict[str, list[Tokens]] = {}
        for split in dict.fromkeys(split for part in parts for split in part.corpus.tokens):
            tokens[split] = []
            for part in parts:
                lacking = [np.zeros(0, np.int64)] * len(part.corpus.domains)
                tokens[split] += part.corpus.tokens.get(split, lacking)
        return cls(tokenizer, domains, tokens, fingerprint, parts)

    @property
    def shares(self) -> list[float]:
        """Share of each domain in the training samples, `[D]`; within a part proportional to training tokens."""
        shares: list[float] = []
        total = sum(part.weight for part in self.parts)
        for _, weight, corpus in self.parts:
            sizes: Sequence[float]
            sizes = corpus.shares if isinstance(corpus, OpenBlend) else [len(array) for array in corpus.tokens["train"]]
            shares += [weight / total * size / sum(sizes) for size in sizes]
        return shares

    @override
    def training_source(self, seq_len: int, seed: int) -> TokenSource:
        """Return the parts' samples in turn, each part with a seed of its own; log how often each part is repeated."""
        sources, total = [], sum(part.weight for part in self.parts)
        for name, weight, corpus in self.parts:
            source = corpus.training_source(seq_len, derive_seed(seed, name))
            remedy = "tokenise it in advance with nlgmoe prepare-data"
            require(not source.has_cursors, f"the part {name!r} is a stream, which a blend cannot read; {remedy}")
            epoch = ""
            if windows := getattr(source, "num_windows", None):
                epoch = f", used up every {round(windows * seq_len * total / weight):,} tokens of the blend"
            rank_zero_info(f"blend: {name} has {weight / total:.2%} of the samples{epoch}")
            sources.append(source)
        domains = [len(part.corpus.domains) for part in self.parts]
        return BlendedSource(sources, [part.weight for part in self.parts], domains)


class BlendedSource(TokenSource):
    """Training samples of several sources, interleaved by weight.

    Args:
        sources: endless sources of the parts, all of one sequence length.
        weights: whole numbers above 0.
        domains: number of domains of each part; a sample's domain counts through them.
    """

    def __init__(self, sources: Sequence[TokenSource], weights: Sequence[int], domains: Sequence[int]) -> None:
        self.seq_len = sources[0].seq_len
        self._sources = list(sources)
        self._interleaving = Interleaving(weights)
        self._first_domains = [sum(domains[:part]) for part in range(len(sources))]

    def sample(self, index: int) -> Sample:
        """Return the next sample of the part that `Interleaving` names."""
        part, own_index = self._interleaving.place(index)
        sample = self._sources[part].sample(own_index).copy()
        sample["domain"] = sample["domain"] + self._first_domains[part]
        return sample


@dataclass(frozen=True)
class _Fork:
    left: "int | _Fork"  # an integer is a part
    right: "int | _Fork"
    left_weight: int
    weight: int

    def count_left(self, samples: int) -> int:
        """Return how many of the first `samples` are the left branch's: its share, rounded half up."""
        return (2 * samples * self.left_weight + self.weight) // (2 * self.weight)


class Interleaving:
    """Maps each sample of a blend to its part, and its number in the part, by exact arithmetic without tables.

    Megatron writes part and number of each sample of the run into arrays before training, picking every time the part that
    is furthest behind its share: 146 million entries for 300B tokens.

    The parts are the leaves of a binary tree. Of the first n samples of a node whose branches weigh l and r, the left
    branch has had n l / (l + r), rounded to the nearest whole number; a sample that raises this count is the left branch's.

    **At every point each part is within 1.68 samples of its share.** At a node that has had n samples, a branch with the
    fraction p of its weight has had n p + e, |e| <= 1/2, so its distance d from its share of all samples is p times the
    node's, plus e. From the root, which has none, down to a part of weight w: |d| <= (1 + w/a1 + w/a2 + ...) / 2, where a1,
    a2, ... are the weights of the nodes above it without the root. The tree is Huffman's, which joins the two lightest nodes
    at a time: what a node is joined with, from the second one above a part on, is no lighter than the node below it. So
    a1 > w, a2 >= a1 + w, a3 >= a2 + a1, ...: they grow as Fibonacci's numbers, and the sum is below 1 + 1 + 1/2 + 1/3 +
    1/5 + 1/8 + ... = 3.36.

    Huffman's tree is also the one with the fewest divisions a sample, on average at most log2 of the number of parts plus 1.
    Python's whole numbers have no limit, so the counts are exact for any number of samples.

    Args:
        weights: whole numbers above 0.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        number = itertools.count()  # decides between equal weights, so that nodes themselves are never compared
        queue: list[tuple[int, int, int | _Fork]] = []
        for part, weight in enumerate(weights):
            heapq.heappush(queue, (weight, next(number), part))
        while len(queue) > 1:
            left_weight, _, left = heapq.heappop(queue)
            right_weight, _, right = heapq.heappop(queue)
            total = left_weight + right_weight
            heapq.heappush(queue, (total, next(number), _Fork(left, right, left_weight, total)))
        self._root = queue[0][2]

    def place(self, index: int) -> tuple[int, int]:
        """Return the part of sample `index`, and the sample's number in the part."""
        node = self._root
        while isinstance(node, _Fork):
            before = node.count_left(index)
            if node.count_left(index + 1) > before:
                node, index = node.left, before
            else:
                node, index = node.right, index - before
        return node, index


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Return whole numbers in the same ratio; 0.1 is a tenth, not the nearest binary fraction."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    unit = math.lcm(*(weight.denominator for weight in exact))
    return [int(weight * unit) for weight in exact]
