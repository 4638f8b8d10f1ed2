"""Made-up documents, and what data modules say of them."""

import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from nlgmoe.data import PileDataModule
from nlgmoe.data.pocket_build import write_corpus
from nlgmoe.data.pocket_documents import Document
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import train_byte_level_bpe

WORDS = ["the", "cat", "mats", "naïve", "日本", "students", "reading", "<|endoftext|>", "12", "books,", "quietly\n\n"]


def make_documents(count: int, domain: str, seed: int) -> list[Document]:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(60, 160))) for _ in range(count)]
    return [Document(text, domain, f"{domain}.tar.gz:{i}") for i, text in enumerate(texts)]


def tokens_of(data: PileDataModule, split: str) -> Sequence[np.ndarray]:
    """Tokens of each domain, in the order in which they lie on disk."""
    return data._opened().tokens[split]


def write_tiny_corpus(root: Path) -> None:
    documents = make_documents(40, "prose", 1) + make_documents(25, "verse", 2)
    write_corpus(root, "tiny", documents, {"made up": "none"})
    backend = train_byte_level_bpe(iter([document.text for document in documents]), vocab_size=400)
    (root / "tokenizer").mkdir()
    backend.save(str(root / "tokenizer" / "tokenizer.json"))


class Ranks:
    """Stands for a trainer: all that the data module asks of it."""

    def __init__(self, rank: int = 0, world_size: int = 1, device: str = "cpu") -> None:
        self.global_rank, self.world_size = rank, world_size
        self.strategy = SimpleNamespace(root_device=torch.device(device))


def batches(data: PileDataModule, count: int, rank: int = 0, world_size: int = 1) -> list[dict[str, torch.Tensor]]:
    data.trainer = Ranks(rank, world_size)  # type: ignore[assignment]
    return list(islice(data.train_dataloader(), count))


def rows(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return batch["targets"].tolist()


def small() -> Tokenizer:
    return Tokenizer(train_byte_level_bpe(iter(["low lower lowest", "new newer newest"] * 9), 300), "small")
