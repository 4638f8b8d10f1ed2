"""A corpus in Megatron's indexed format: one prefix or many, split by document into training, validation and test.

The public-Pile runs of the tutorial read `pile_text_document.bin` and `.idx`, written by Megatron's
`tools/preprocess_data.py`; `nlgmoe prepare-data --input` writes the same, and a `.json` that describes them. `prepare` checks the
whole index, `open` a sample of the tokens; `sampling.py` checks the ids of every window that is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path

import numpy as np

from nlgmoe.data.corpus import HASHED_PIECES, Fingerprint, OpenCorpus, build_lock, hash_of, hash_of_pieces
from nlgmoe.data.indexed import IndexedDataset
from nlgmoe.data.prefix import Sidecar, find_prefixes
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import load_tokenizer
from nlgmoe.data.tokens import ChainedTokens, Piece, Tokens
from nlgmoe.validation import RunError, SettingError, require

# Evenly spaced over the corpus. Few, because each is a random read, slow on a network disk.
SAMPLED_DOCUMENTS = 100  # for their ends; of many prefixes at least two each
COMPARED_DOCUMENTS = 20  # at most, with the tokenizer
PIECES_OF_MANY = 4  # hashed of each file of many, whatever their number
SPLITS = ("train", "validation", "test")


class MegatronIndexed:
    """Documents tokenised in advance, each ending with its end-of-document token, in the files of one prefix or of many.

    `PREFIX.bin` has the tokens, `PREFIX.idx` the documents; `PREFIX.json`, which `nlgmoe prepare-data` writes, names tokenizer,
    domain and the documents held out for validation, the last ones. Several prefixes are one corpus: samples are drawn from
    the training documents of all.

    Args:
        prefix: path without `.bin` / `.idx`, and without `-I-of-N` for all N shards of a corpus; or a pattern such as
            `data/pile/*`; or a list of these.
        split: shares of training, validation and test documents of each prefix, in file order, in any unit (`--split` of
            Megatron); without test documents, `test` evaluates the validation documents. None: the documents held out are for
            validation.
    """

    def __init__(self, prefix: list[str] | str, split: Sequence[float] | None = None) -> None:
        if split is not None and not (len(split) == 3 and min(split) >= 0 and sum(split) > 0):
            shares = "three shares of documents (training, validation, test), none negative and not all 0"
            raise SettingError(f"split={list(split)} must be {shares}, such as [98, 2, 0]")
        self.prefix = [prefix] if isinstance(prefix, str) else list(prefix)
        named = self.prefix != [] and "" not in self.prefix
        require(named, "prefix is empty; give the path of the corpus without .bin and .idx")
        self.split = split

    def own_tokenizer(self) -> str:
        """Return the tokenizer that `PREFIX.json` names."""
        prefix = find_prefixes(self.prefix)[0]
        if (sidecar := Sidecar.read(prefix)) is None:
            raise _without_sidecar(prefix)
        return sidecar.tokenizer_of(prefix)

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Check the whole index of each prefix, and build the tokenizer if it is missing. The files must exist."""
        for prefix in find_prefixes(self.prefix):
            IndexedDataset(prefix).check()
        with build_lock(data_dir):
            load_tokenizer(tokenizer, data_dir)

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Cut the documents into splits, and check samples of them against the tokenizer."""
        prefixes = find_prefixes(self.prefix)
        loaded = load_tokenizer(tokenizer, data_dir)
        parts = [_open_part(prefix, len(prefixes), self.split, loaded) for prefix in prefixes]
        if other := next((part for part in parts if part.dtype != parts[0].dtype), None):
            types = f"its tokens are of type {other.dtype}, those of {parts[0].prefix} of {parts[0].dtype}"
            raise SettingError(f"prefix={other.prefix}: {types}; write one of them again, or train on one")
        domains: dict[str, list[Part]] = {}
        folder = Path(commonpath([part.prefix.absolute().parent for part in parts])).name
        for part in parts:
            domains.setdefault(part.domain or folder, []).append(part)
        sizes = [sum(part.ends[number + 1] - part.ends[number] for part in parts) for number in range(len(SPLITS))]
        if missing := [name for name, size in zip(SPLITS[:2], sizes, strict=False) if size == 0]:
            documents = f"{sum(part.bounds[-1] for part in parts):,} documents of {', '.join(self.prefix)}"
            split = "null" if self.split is None else list(self.split)
            problem = f"split={split} leaves {' and '.join(missing)} none of the {documents}"
            raise SettingError(f"{problem}; set split, such as [90, 10, 0], raise the share, or give more text")
        maps: dict[Path, np.ndarray] = {}
        present = [(number, name) for number, name in enumerate(SPLITS) if sizes[number]]
        tokens = {name: [_tokens(members, number, maps) for members in domains.values()] for number, name in present}
        return OpenCorpus(loaded, list(domains), tokens, _fingerprint(parts))


@dataclass(frozen=True)
class Part:
    """A prefix and its splits."""

    prefix: Path
    dtype: np.dtype  # of its tokens
    domain: str  # of its sidecar; empty without one
    bounds: list[int]  # first document of each split, and the number of documents
    ends: list[int]  # the same in tokens
    hashes: dict[str, str]  # of its two files


def _open_part(prefix: Path, prefixes: int, split: Sequence[float] | None, tokenizer: Tokenizer) -> Part:
    dataset, sidecar = IndexedDataset(prefix), Sidecar.read(prefix)
    if sidecar is not None:
        sidecar.check(prefix, dataset.documents, len(dataset.tokens), tokenizer)
    _check_sample(dataset, tokenizer, max(2, SAMPLED_DOCUMENTS // prefixes), compares=sidecar is None)
    if split is not None:
        bounds = split_documents(dataset.documents, split)
    elif sidecar is not None:
        bounds = [0, dataset.documents - sidecar.held_out, dataset.documents, dataset.documents]
    else:
        raise _without_sidecar(prefix)
    pieces = HASHED_PIECES if prefixes == 1 else PIECES_OF_MANY
    hashes = {kind: hash_of_pieces(f"{prefix}.{kind}", pieces) for kind in ("idx", "bin")}
    domain = sidecar.domain if sidecar else prefix.name if prefixes == 1 else ""
    ends = [dataset.first_token(number) for number in bounds]
    return Part(prefix, dataset.dtype, domain, bounds, ends, hashes)


def _without_sidecar(prefix: Path) -> SettingError:
    remedy = "set data.tokenizer to the tokenizer that they were made with, and split of the corpus, such as [98, 2, 0]"
    return SettingError(f"prefix={prefix}: there is no {prefix.name}.json, as beside files of Megatron; {remedy}")


def _tokens(parts: Sequence[Part], split: int, maps: dict[Path, np.ndarray]) -> Tokens:
    bounds = [(part, part.ends[split], part.ends[split + 1]) for part in parts]
    pieces = [Piece(Path(f"{part.prefix}.bin"), first, end - first) for part, first, end in bounds]
    return ChainedTokens(pieces, parts[0].dtype, maps)


def _fingerprint(parts: Sequence[Part]) -> Fingerprint:
    if len(parts) == 1:
        return {**parts[0].hashes, "training documents": parts[0].bounds[1]}
    facts = [(part.domain, part.bounds[1], *part.hashes.values()) for part in parts]
    return {"prefixes": f"{len(parts)} of {hash_of(facts)}"}


def _check_sample(dataset: IndexedDataset, tokenizer: Tokenizer, count: int, compares: bool) -> None:
    """Check that sampled documents end with the end-of-document token, and, without a sidecar, have the tokenizer's ids."""
    path, documents = f"{dataset.prefix}.bin", dataset.documents
    sampled = np.unique(np.linspace(0, documents - 1, min(documents, count), dtype=np.int64)).tolist()
    bounds = [(dataset.first_token(number), dataset.first_token(number + 1)) for number in sampled]
    closed = [bool(dataset.tokens[end - 1] == tokenizer.eod_id) for first, end in bounds if end > first]
    if not all(closed):
        end_token = f"{tokenizer.name}'s end-of-document token ({tokenizer.eod_id})"
        problem = f"{closed.count(False)} of {len(closed)} sampled documents in {path} do not end with {end_token}"
        remedy = "write the corpus again with --append-eod, or set data.tokenizer to the one it was made with."
        raise RunError(f"{problem}: {remedy}")
    # First sequences, because Megatron can tokenise each sentence by itself.
    filled = [number for number, (first, end) in zip(sampled, bounds, strict=True) if end > first + 1]
    step = -(-len(filled) // COMPARED_DOCUMENTS) or 1
    texts = [dataset[int(dataset.document_indices[number])] for number in filled[::step] if compares]
    tokenizer.check_documents(texts, path)


def split_documents(documents: int, split: Sequence[float]) -> list[int]:
    """Return the first document of each part, followed by the number of documents, rounded as by Megatron.

    Each part is its share of the documents, rounded separately; the first part is then adjusted so that the sum is right.
    """
    sizes = [round(share / sum(split) * documents) for share in split]
    sizes[0] += documents - sum(sizes)
    return [0, *np.cumsum(sizes).tolist()]
