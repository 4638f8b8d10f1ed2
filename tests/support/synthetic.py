"""A data module without text: batches are a pure function of (seed, samples consumed), like the real one's."""

from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from nlgmoe.batch import truncate
from nlgmoe.data import TrainingData
from nlgmoe.data.sampling import collate
from nlgmoe.seeding import derive_seed


@dataclass(eq=False)
class Samples(Dataset):
    vocab_size: int
    seq_len: int
    first: int
    count: int
    padded: bool = False
    documents: bool = False
    numbered: bool = False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(derive_seed("synthetic", self.first + index))
        steps = torch.randint(1, 4, (self.seq_len + 1,), generator=generator)
        window = steps.cumsum(0) % self.vocab_size  # a learnable walk
        length = (self.first + index) * 5 % self.seq_len + 1 if self.padded else self.seq_len
        sample = {
            "tokens": window[:-1],
            "targets": window[1:],
            "token_mask": torch.arange(self.seq_len) < length,
            "domain": torch.tensor(index % 2),
        }
        if self.documents:
            opens = torch.arange(self.seq_len) % (3 + (self.first + index) % 5) == 2
            sample |= {"document": opens.cumsum(0), "loss_mask": sample["token_mask"] & ~opens}
        return sample | {"samples": self.first + index} if self.numbered else sample


class SyntheticData(TrainingData):
    """`vocab_size` ids, each spelling one byte; two domains.

    Ranks get consecutive slices of `micro_batch_size` samples, and in evaluation every world-size-th window. With
    `padded`, samples have different lengths; with `documents`, different borders, whose first token counts in no loss.
    """

    windows = 12  # of an evaluation, over all ranks

    def __init__(
        self,
        vocab_size: int = 61,
        seq_len: int = 16,
        micro_batch_size: int = 4,
        padded: bool = False,
        documents: bool = False,
    ) -> None:
        super().__init__()
        self.padded, self.documents = padded, documents
        self.ids, self.seq_len, self.micro_batch_size = vocab_size, seq_len, micro_batch_size

    @property
    def domains(self) -> list[str]:
        return ["even", "odd"]

    @property
    def vocab_size(self) -> int:
        return self.ids

    def fingerprint(self) -> dict[str, str | int]:
        return {"corpus": "a walk", "vocab_size": self.vocab_size, "seq_len": self.seq_len}

    def batch_size_after(self, samples: int) -> int:
        accumulated = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return self.micro_batch_size * self._rank_and_world()[1] * accumulated

    def token_byte_lengths(self) -> torch.Tensor:
        return torch.ones(self.vocab_size)

    def has_equal_batches(self) -> bool:
        return True

    def train_dataloader(self) -> DataLoader:
        samples = Samples(self.vocab_size, self.seq_len, self.samples_consumed, 10**9, self.padded, self.documents)
        (rank, world), size = self._rank_and_world(), self.micro_batch_size
        batches = (list(range(first, first + size)) for first in count(rank * size, world * size))
        return DataLoader(samples, batch_sampler=batches, collate_fn=collate, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader:
        rank, world = self._rank_and_world()
        windows = Samples(self.vocab_size, self.seq_len, 10**9, self.windows, self.padded, self.documents)
        sampler = range(rank, self.windows, world)
        return DataLoader(windows, batch_size=4, sampler=sampler, collate_fn=collate, generator=torch.Generator())

    test_dataloader = predict_dataloader = val_dataloader

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


class ToLongest(SyntheticData):
    """The same, each batch of training cut to its longest text: its size is another on each rank."""

    def has_equal_batches(self) -> bool:
        return False

    def train_dataloader(self) -> DataLoader:
        loader = super().train_dataloader()
        loader.collate_fn = _to_longest
        return loader


def _to_longest(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    batch = collate(samples)
    return truncate(batch, int(batch["token_mask"].sum(1).max()))  # type: ignore[arg-type,return-value]


class NumberedData(SyntheticData):
    """The same samples in the same order, and their numbers with them."""

    def __init__(self, seed: int = 1, **settings: Any) -> None:
        super().__init__(**settings)
        self.seed, self.document_attention = seed, self.documents

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {"tokenizer": "numbers", "seed": self.seed}

    def train_dataloader(self) -> DataLoader:
        loader = super().train_dataloader()
        loader.dataset.numbered, loader.collate_fn = True, _with_numbers
        return loader


def _with_numbers(samples: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = [sample.pop("samples") for sample in samples]
    return collate(samples) | {"samples": numbers}
