"""A tiny corpus of two domains, with a tokenizer trained on it, built once."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlgmoe.data import PileDataModule
from nlgmoe.data.pocket.build import write_corpus
from nlgmoe.data.pocket.deduplication import Document
from nlgmoe.data.tokenizer_loading import train_byte_level_bpe

WORDS = ["the", "cat", "mats", "naïve", "日本", "students", "reading", "<|endoftext|>", "12", "books,", "quietly\n\n"]


def make_documents(count: int, domain: str, seed: int) -> list[Document]:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(60, 160))) for _ in range(count)]
    return [Document(text, domain, f"{domain}.tar.gz:{i}") for i, text in enumerate(texts)]


def tokens_of(data: PileDataModule, split: str) -> Sequence[np.ndarray]:
    """Tokens of each domain, in the order in which they lie on disk."""
    corpus = data._opened()
    tokens = corpus.training_tokens() if split == "train" else corpus.evaluation_tokens(split)
    assert tokens is not None
    return tokens


def write_tiny_corpus(root: Path) -> None:
    documents = make_documents(40, "prose", 1) + make_documents(25, "verse", 2)
    write_corpus(root, "tiny", documents, {"made up": "none"})
    backend = train_byte_level_bpe(iter([document.text for document in documents]), vocab_size=400)
    (root / "tokenizer").mkdir()
    backend.save(str(root / "tokenizer" / "tokenizer.json"))


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    write_tiny_corpus(root)
    return root


@pytest.fixture
def make_data(tiny_corpus: Path) -> Callable[..., PileDataModule]:
    def make(**options: Any) -> PileDataModule:
        defaults: dict[str, Any] = {"micro_batch_size": 4, "seq_len": 32, "seed": 7}
        data = PileDataModule(str(tiny_corpus), str(tiny_corpus / "tokenizer"), **(defaults | options))
        data.prepare_data()
        data.setup()
        return data

    return make
