"""A corpus in Megatron's indexed format: one pair of files, split by document into training, validation and test.

The public-Pile runs of the tutorial read `pile_text_document.bin` and `.idx`, written by Megatron's
`tools/preprocess_data.py`; `nlgmoe prepare-data --input` writes the same. On opening, the index is checked whole, the
tokens by samples; ids are checked again whenever a window is read (`sampling.py`).
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from nlgmoe.data.corpus import OpenCorpus, Streams, build_lock
from nlgmoe.data.description import Description
from nlgmoe.data.indexed import IndexedDataset
from nlgmoe.data.tokenizer import Tokenizer, load_tokenizer

# Evenly spaced over the corpus: each is a random read, which takes a network disk its time.
SAMPLED_DOCUMENTS = 100  # for their ends and their tokenizer
PIECES = 64  # for ids beyond the vocabulary, and for the fingerprint
PIECE_BYTES = 1 << 15
COMPARED_TOKENS = 256  # of a sampled document


class MegatronIndexed:
    """`PREFIX.bin` and `PREFIX.idx`, tokenised with `data.tokenizer` and closed by its end-of-document token.

    The documents lie in one order on disk; the first share of them is for training, the next for validation, the rest for
    testing (`--split` of Megatron). An empty test share leaves `test` to evaluate the validation documents.

    Args:
        prefix: path without `.bin` / `.idx`; its last part names the domain.
        split: shares of training, validation and test documents, in any unit.

    Raises:
        ValueError: `split` is not such a list.
    """

    def __init__(self, prefix: str, split: Sequence[float] = (98, 2, 0)) -> None:
        if len(split) != 3 or min(split) < 0 or sum(split) <= 0:
            raise ValueError(
                f"split {list(split)} must be three shares of documents (training, validation, test), none negative and "
                "not all 0, such as [98, 2, 0]."
            )
        self.prefix = Path(prefix)
        self.split = tuple(split)

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Fetch the tokenizer where it is missing. The files must be there.

        Raises:
            ValueError: a file is missing, or the tokenizer is unknown or not usable.
        """
        for path in (f"{self.prefix}.idx", f"{self.prefix}.bin"):
            if not Path(path).exists():
                raise ValueError(
                    f"{path} is missing: set `prefix` of the corpus to files that `nlgmoe prepare-data --input` or Megatron's "
                    "tools/preprocess_data.py --append-eod has written, without the .bin."
                )
        with build_lock(data_dir):
            load_tokenizer(tokenizer, data_dir)

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Map the files, cut them into splits, and check samples of them against the tokenizer.

        Raises:
            ValueError: a file is missing or damaged, a split has no document, or the sampled tokens are not this
                tokenizer's.
        """
        dataset = IndexedDataset(self.prefix)
        bounds = split_documents(len(dataset.document_indices) - 1, self.split)
        ends = [dataset.first_token(document) for document in bounds]
        parts = zip(("train", "validation", "test"), pairwise(ends), strict=True)
        tokens = {name: [dataset.tokens[first:end]] for name, (first, end) in parts if end > first}
        if missing := {"train", "validation"} - set(tokens):
            raise ValueError(
                f"split {list(self.split)} leaves {' and '.join(sorted(missing))} none of the {bounds[-1]:,} documents of "
                f"{self.prefix}: raise the share, or use a larger corpus."
            )
        loaded = load_tokenizer(tokenizer, data_dir)
        self._check(dataset, loaded)
        fingerprint = self._fingerprint(bounds)
        documents = zip(("documents", "validation documents", "test documents"), pairwise(bounds), strict=True)
        facts: dict[str, str | int] = {name: end - first for name, (first, end) in documents}
        described: Description = {self.prefix.name: {**facts, "text": fingerprint}}
        return Streams(loaded, [self.prefix.name], tokens, fingerprint, described)

    def _check(self, dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
        for piece in _pieces(len(dataset.tokens), PIECE_BYTES // dataset.dtype.itemsize):
            ids = dataset.tokens[piece]
            if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
                raise ValueError(
                    f"{self.prefix}.bin holds token ids from {ids.min()} to {ids.max()}, but the tokenizer {tokenizer.name} "
                    f"has {tokenizer.vocab_size}: set data.tokenizer to the one it was made with."
                )
        documents = len(dataset.document_indices) - 1
        sampled = np.unique(np.linspace(0, documents - 1, min(documents, SAMPLED_DOCUMENTS), dtype=np.int64))
        ends = [(dataset.first_token(int(i)), dataset.first_token(int(i) + 1)) for i in sampled]
        closed = [bool(dataset.tokens[end - 1] == tokenizer.eod_id) for first, end in ends if end > first]
        if not all(closed):
            raise ValueError(
                f"{closed.count(False)} of {len(closed)} sampled documents in {self.prefix}.bin do not end with "
                f"{tokenizer.name}'s end-of-document token ({tokenizer.eod_id}): write the corpus again with "
                "tools/preprocess_data.py --append-eod, or set data.tokenizer to the one it was made with."
            )
        # First sequences, because Megatron can tokenise each sentence by itself. Some may differ: not every text is clean.
        texts = [
            dataset[int(dataset.document_indices[number])]
            for number, (first, end) in zip(sampled.tolist(), ends, strict=True)
            if end > first
        ]
        same = [_is_made_by(tokenizer, ids) for ids in texts]
        if same.count(False) > len(same) / 2:
            raise ValueError(
                f"{same.count(False)} of {len(same)} sampled documents in {self.prefix}.bin are not as {tokenizer.name} "
                "tokenises their text: set data.tokenizer to the one they were made with."
            )

    def _fingerprint(self, bounds: list[int]) -> str:
        """Of the split, the files' sizes and pieces of them: a copy elsewhere has the same one."""
        digest = hashlib.sha256(repr(bounds).encode())
        for kind in ("idx", "bin"):
            path = Path(f"{self.prefix}.{kind}")
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            with path.open("rb") as handle:
                for piece in _pieces(size, PIECE_BYTES):
                    handle.seek(piece.start)
                    digest.update(handle.read(piece.stop - piece.start))
        return digest.hexdigest()[:16]


def _pieces(total: int, length: int) -> list[slice]:
    """Evenly spaced parts of [0, total), its beginning and end among them."""
    length = min(length, total)
    starts = np.unique(np.linspace(0, total - length, PIECES, dtype=np.int64)).tolist()
    return [slice(start, start + length) for start in starts]


def _is_made_by(tokenizer: Tokenizer, tokens: np.ndarray) -> bool:
    """Whether tokens of a document are what the tokenizer makes of their text."""
    # Where a text is cut its last words may become other tokens, so that more are encoded than compared.
    ids = tokens[: 2 * COMPARED_TOKENS]
    ids = ids[ids != tokenizer.eod_id]
    if len(ids) and ids.min() < 0:
        return False
    compared = len(ids) if len(tokens) <= 2 * COMPARED_TOKENS else COMPARED_TOKENS
    return tokenizer.encode(tokenizer.decode(ids.tolist()))[:compared] == ids[:compared].tolist()


def split_documents(documents: int, split: Sequence[float]) -> list[int]:
    """First documents of the parts, closed by the number of documents, as Megatron rounds them.

    Each part is its share of the documents, rounded by itself; what the rounded parts have too many or too few is
    taken from or given to the first one.
    """
    sizes = [round(share / sum(split) * documents) for share in split]
    sizes[0] += documents - sum(sizes)
    return [0, *np.cumsum(sizes).tolist()]
