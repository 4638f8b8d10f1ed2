"""A corpus in Megatron's indexed format: one pair of files, split by document into training, validation and test.

The public-Pile runs of the tutorial read `pile_text_document.bin` and `.idx`, written by Megatron's
`tools/preprocess_data.py`; `nlgmoe prepare-data --input` writes the same. Opening checks the whole
index and samples of the tokens; `sampling.py` checks the ids of every window that is read.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from nlgmoe.data.corpus import Fingerprint, OpenCorpus, TokenArrays, build_lock, hash_of_pieces
from nlgmoe.data.indexed import IndexedDataset
from nlgmoe.data.tokenizer import COMPARED_TOKENS, SAME_TOKENIZER, Tokenizer
from nlgmoe.data.tokenizer_loading import load_tokenizer
from nlgmoe.validation import RunError, SettingError, require

# Evenly spaced over the corpus. Few, because each is a random read, slow on a network disk.
SAMPLED_DOCUMENTS = 100  # for their ends and their tokenizer
DEFAULT_SPLIT = (98, 2, 0)


class MegatronIndexed:
    """`PREFIX.bin` and `PREFIX.idx`: documents tokenised with `data.tokenizer`, each ending with its end-of-document token.

    The first share of the documents, in file order, is for training, the next for validation, the rest for testing
    (`--split` of Megatron). If the test share is empty, `test` evaluates the validation documents.

    Args:
        prefix: path without `.bin` / `.idx`; its last part is the name of the domain.
        split: shares of training, validation and test documents, in any unit.

    Raises:
        ValueError: `split` is not three shares.
    """

    def __init__(self, prefix: str, split: Sequence[float] = DEFAULT_SPLIT) -> None:
        require(
            len(split) == 3 and min(split) >= 0 and sum(split) > 0,
            f"split={list(split)} must be three shares of documents (training, validation, test), none negative and not all 0, "
            "such as [98, 2, 0]",
        )
        require(str(prefix) != "", "prefix is empty; give the path of the corpus without .bin and .idx")
        self.prefix = Path(prefix)
        self.split = tuple(split)

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Build the tokenizer if it is missing. The files must exist."""
        for path in (f"{self.prefix}.idx", f"{self.prefix}.bin"):
            if not Path(path).exists():
                raise SettingError(
                    f"{path} is missing: set `prefix` of the corpus to files that `nlgmoe prepare-data --input` or Megatron's "
                    "tools/preprocess_data.py --append-eod has written, without the .bin."
                )
        with build_lock(data_dir):
            load_tokenizer(tokenizer, data_dir)

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Map the files, cut them into splits, and check samples of them against the tokenizer."""
        dataset = IndexedDataset(self.prefix)
        bounds = split_documents(len(dataset.document_indices) - 1, self.split)
        ends = [dataset.first_token(document) for document in bounds]
        parts = zip(("train", "validation", "test"), pairwise(ends), strict=True)
        tokens = {name: [dataset.tokens[first:end]] for name, (first, end) in parts if end > first}
        if missing := {"train", "validation"} - set(tokens):
            raise SettingError(
                f"split {list(self.split)} leaves {' and '.join(sorted(missing))} none of the {bounds[-1]:,} documents of "
                f"{self.prefix}: raise the share, or use a larger corpus."
            )
        loaded = load_tokenizer(tokenizer, data_dir)
        self._check(dataset, loaded)
        fingerprint: Fingerprint = {kind: hash_of_pieces(f"{self.prefix}.{kind}") for kind in ("idx", "bin")}
        return TokenArrays(loaded, [self.prefix.name], tokens, fingerprint | {"training documents": bounds[1]})

    def _check(self, dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
        documents = len(dataset.document_indices) - 1
        sampled = np.unique(np.linspace(0, documents - 1, min(documents, SAMPLED_DOCUMENTS), dtype=np.int64)).tolist()
        bounds = [(dataset.first_token(number), dataset.first_token(number + 1)) for number in sampled]
        closed = [bool(dataset.tokens[end - 1] == tokenizer.eod_id) for first, end in bounds if end > first]
        if not all(closed):
            raise RunError(
                f"{closed.count(False)} of {len(closed)} sampled documents in {self.prefix}.bin do not end with "
                f"{tokenizer.name}'s end-of-document token ({tokenizer.eod_id}): write the corpus again with "
                "tools/preprocess_data.py --append-eod, or set data.tokenizer to the one it was made with."
            )
        # First sequences, because Megatron can tokenise each sentence by itself.
        texts = [
            dataset[int(dataset.document_indices[number])]
            for number, (first, end) in zip(sampled, bounds, strict=True)
            if end > first
        ]
        # A document of two such tokens may be the token's name as text, and its end.
        if empty := sum(len(ids) > 2 and bool((ids[:COMPARED_TOKENS] == tokenizer.eod_id).all()) for ids in texts):
            raise RunError(
                f"{empty} of {len(texts)} sampled documents in {self.prefix}.bin hold end-of-document tokens alone: parts of the "
                "file are missing; copy it again, or write the corpus again."
            )
        if (same := tokenizer.share_reproduced(texts)) < SAME_TOKENIZER:
            raise RunError(
                f"{self.prefix}.bin holds another tokenizer's ids: {same:.0%} of those in {len(texts)} sampled documents come "
                f"back when their text is tokenised with {tokenizer.name}: set data.tokenizer to the one they were made with."
            )


def choose_split(dataset: IndexedDataset, held_out: int) -> list[int] | None:
    """Return numbers of training, validation and test documents, the last `held_out` documents for validation.

    In a small corpus, validation has more documents: at least 2,048 tokens (a sequence of the paper's models) or a tenth of the
    tokens. None: one document cannot be divided.
    """
    count = len(dataset.document_indices) - 1
    if count < 2:
        return None
    first = max(1, count - held_out)
    wanted = min(2048, len(dataset.tokens) // 10)
    while first > 1 and len(dataset.tokens) - dataset.first_token(first) < max(wanted, 1):
        first -= 1
    return [first, count - first, 0]


def split_documents(documents: int, split: Sequence[float]) -> list[int]:
    """Return the first document of each part, followed by the number of documents, rounded as by Megatron.

    Each part is its share of the documents, rounded separately; the first part is then adjusted so that the sum is right.
    """
    sizes = [round(share / sum(split) * documents) for share in split]
    sizes[0] += documents - sum(sizes)
    return [0, *np.cumsum(sizes).tolist()]
