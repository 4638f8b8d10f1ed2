"""A tiny corpus of two domains, with a tokenizer trained on it, built once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nlgmoe.data import PileDataModule
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import load_tokenizer
from tests.support.corpora import write_tiny_corpus


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


@pytest.fixture(scope="module")
def tokenizer(tiny_corpus: Path) -> Tokenizer:
    return load_tokenizer(str(tiny_corpus / "tokenizer"), tiny_corpus)
