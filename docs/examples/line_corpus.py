"""A corpus that is tokenised as a run starts, and kept in memory: two text files with a document in each line."""

import hashlib
from pathlib import Path

import numpy as np

from nlgmoe.data import OpenCorpus, Tokenizer, load_tokenizer


class LineCorpus:
    """Text files with a document in each line.

    Args:
        train: file of the training text.
        validation: file of the validation text.
    """

    def __init__(self, train: str, validation: str) -> None:
        self.files = {"train": Path(train), "validation": Path(validation)}

    def prepare(self, data_dir: Path, tokenizer: str) -> None:
        """Fetch the tokenizer where it is missing; one process a node."""
        load_tokenizer(tokenizer, data_dir)

    def open(self, data_dir: Path, tokenizer: str) -> OpenCorpus:
        """Tokenise both files; every process."""
        loaded = load_tokenizer(tokenizer, data_dir)
        tokens = {split: [_tokenise(file, loaded)] for split, file in self.files.items()}
        text = hashlib.sha256(self.files["train"].read_bytes()).hexdigest()  # a checkpoint resumes on this text alone
        return OpenCorpus(loaded, ["lines"], tokens, {"lines": text})  # one domain


def _tokenise(file: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Return the documents' tokens, `[N]`, each document closed by the end-of-document token."""
    with file.open(encoding="utf-8") as lines:  # str.splitlines would also split at form feeds and U+2028
        documents = tokenizer.encode_batch([line.removesuffix("\n") for line in lines])
    return np.array([token for ids in documents for token in tokenizer.closed(ids)], np.int32)
