"""A data module without text: batches are a pure function of (seed, samples consumed), like the real one's."""

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from nlgmoe.seeding import derive_seed


class _Samples(Dataset):
    def __init__(self, vocab_size: int, seq_len: int, first: int, count: int) -> None:
        self.vocab_size, self.seq_len, self.first, self.count = vocab_size, seq_len, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(derive_seed("synthetic", self.first + index))
        steps = torch.randint(1, 4, (self.seq_len + 1,), generator=generator)
        window = steps.cumsum(0) % self.vocab_size  # a learnable walk
        return {
            "tokens": window[:-1],
            "targets": window[1:],
            "token_mask": torch.ones(self.seq_len, dtype=torch.bool),
            "domain": torch.tensor(index % 2),
        }


class SyntheticData(LightningDataModule):
    """`vocab_size` ids, each spelling one byte; two domains."""

    def __init__(self, vocab_size: int = 61, seq_len: int = 16, micro_batch_size: int = 4) -> None:
        super().__init__()
        self.vocab_size, self.seq_len, self.micro_batch_size = vocab_size, seq_len, micro_batch_size
        self.domains = ["even", "odd"]
        self.samples_consumed = 0
        self.fetched: list[int] = []

    def token_byte_lengths(self) -> torch.Tensor:
        return torch.ones(self.vocab_size)

    def advance(self, samples: int) -> None:
        self.samples_consumed += samples

    def state_dict(self) -> dict[str, int]:
        return {"samples_consumed": self.samples_consumed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.samples_consumed = state_dict["samples_consumed"]

    def train_dataloader(self) -> DataLoader:
        samples = _Samples(self.vocab_size, self.seq_len, self.samples_consumed, 10**9)
        return DataLoader(samples, batch_sampler=_Endless(self.micro_batch_size), generator=torch.Generator())

    def val_dataloader(self) -> DataLoader:
        return DataLoader(_Samples(self.vocab_size, self.seq_len, 10**9, 12), batch_size=4, generator=torch.Generator())

    test_dataloader = predict_dataloader = val_dataloader


class _Endless:
    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __iter__(self):
        start = 0
        while True:
            yield list(range(start, start + self.batch_size))
            start += self.batch_size
