"""`TrainingData`: the data module that training needs to resume a run exactly, on any number of ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.validation import SettingError, list_differences


class TrainingData(LightningDataModule, ABC):
    """A data module whose batches are a function of the samples trained on.

    `train_dataloader` returns this rank's micro-batches (`nlgmoe.batch.Batch`) from sample `samples_consumed` on: R ranks with
    micro-batches of B sequences take samples `R * B * i` to `R * B * (i + 1) - 1` in micro-batch i, rank 0 the first B. A
    loader that reads ahead does not count: training calls `advance` after each optimizer step.

    Other data modules and dataloaders train too; a resumed run may then repeat or skip data (docs/data.md).
    """

    samples_consumed: int = 0  # trained on, over all ranks; saved in checkpoints
    seq_len: int | None = None  # tokens of a whole sequence; None: the model's `seq_len`
    document_attention: bool = False  # true if batches contain `document`

    @property
    @abstractmethod
    def domains(self) -> list[str]:
        """Names of the domains, by which the loss is logged; a batch's `domain` indexes them."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str | int]:
        """Return settings and hashes by name; with a sample's number they determine its tokens."""

    @abstractmethod
    def batch_size_after(self, samples: int) -> int:
        """Return the sequences of the optimizer step after the first `samples`, over all ranks."""

    def has_equal_batches(self) -> bool:
        """Return True if each micro-batch of training has as many tokens on every rank, padding included.

        Expert parallelism then needs no synchronisation for the number of rows to send (`LocalDispatcher.equal_batches`).
        """
        return False

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, which checkpoints keep; None: none of this package."""
        return None

    def token_byte_lengths(self) -> Tensor:
        """Return the number of bytes of text of each token id, `[V]`; zeros: the loss per byte is not logged."""
        return torch.zeros(self.vocab_size) if self.tokenizer is None else torch.as_tensor(self.tokenizer.token_bytes)

    @property
    def domain_shares(self) -> list[float] | None:
        """Share of each domain in the training samples, `[D]`, if its settings determine it; else None."""
        return None

    def advance(self, samples: int) -> None:
        """Count the samples of an optimizer step, over all ranks."""
        self.samples_consumed += samples

    def state_dict(self) -> dict[str, Any]:
        """Return `samples_consumed` and the `fingerprint`."""
        return {"samples_consumed": self.samples_consumed, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume a checkpoint's run, or evaluate it.

        Raises:
            SettingError: the run had other data. Evaluation compares only the tokenizer.
        """
        current, saved = self.fingerprint(), state_dict["fingerprint"]
        evaluates = self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING
        ignored = (saved.keys() | current.keys()) - (current.keys() & {"tokenizer"}) if evaluates else ()
        if changes := list_differences(saved, current, ignored):
            problem = f"The checkpoint was trained on other data; these differ: {', '.join(changes)}"
            remedy = "start a new run from its weights with model.warm_start.checkpoint"
            raise SettingError(f"{problem}. Set the data options as in that run to resume it, or {remedy}.")
        self.samples_consumed = state_dict["samples_consumed"]


def training_data(trainer: Trainer | None) -> TrainingData | None:
    """Return the data module of this fit or evaluation if it is `TrainingData`; `MoEGPTModule.setup` forgets an earlier one."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, TrainingData) else None


def length_of(data: TrainingData | None, longest: int) -> int:
    """Return the tokens of a whole sequence of the data; `longest`, the model's, if the data does not name them."""
    return longest if data is None or data.seq_len is None else data.seq_len
