"""The seam between data and training: what a batch is, and what the module asks of a data module."""

from __future__ import annotations

from typing import NotRequired, Protocol, TypedDict, cast, runtime_checkable

from torch import Tensor


class Batch(TypedDict):
    """What a data module yields; B sequences of T tokens.

    Attributes:
        tokens: `[B, T]` int64, what the model reads.
        targets: `[B, T]` int64, what it shall predict at each position.
        token_mask: `[B, T]` bool, False at padding.
        domain: `[B]` int64, index into the data module's `domains`.
        padded: whether `token_mask` has a False; not needed, but to look for one on a GPU is to wait for it.
        loss_mask: `[B, T]` bool, False where a position's loss does not count, padding included; only if that is more than
            `token_mask` says. Such positions are read and routed like any other.
        document: `[B, T]` int64, the number of the document that each position belongs to; only if attention is to end at
            their borders.
        samples: B numbers, of the sequences in the run's order, not on a GPU; only in training, and only where the data module
            `NumbersSamples`.
    """

    tokens: Tensor
    targets: Tensor
    token_mask: Tensor
    domain: Tensor
    padded: NotRequired[bool]
    loss_mask: NotRequired[Tensor]
    document: NotRequired[Tensor]
    samples: NotRequired[list[int]]


def mask_or_none(batch: Batch) -> Tensor | None:
    """The token mask, or None where nothing is masked: attention is faster without one."""
    mask = batch["token_mask"]
    padded = batch.get("padded")
    return mask if (not mask.all() if padded is None else padded) else None


def loss_mask(batch: Batch) -> Tensor:
    """`[B, T]` bool, False where no loss is taken."""
    return batch.get("loss_mask", batch["token_mask"])


def cut(batch: Batch, length: int) -> Batch:
    """The first `length` positions of every sequence."""
    short = {
        name: value[:, :length] if isinstance(value, Tensor) and value.dim() == 2 else value
        for name, value in batch.items()
    }
    return cast(Batch, short)


@runtime_checkable
class CountsSamples(Protocol):
    """A data module that resumes: it is told how many samples have been trained on."""

    def advance(self, samples: int) -> None:
        """Count `samples` more, over all ranks."""


@runtime_checkable
class PlansBatches(Protocol):
    """A data module whose steps may grow."""

    def planned_batch_size(self) -> int | None:
        """Sequences of the next optimizer step, over all ranks; None if steps are to stay alike."""


@runtime_checkable
class SizesBatches(Protocol):
    """A data module that knows how large its micro-batches are before it makes them."""

    def largest_batch(self, stage: str) -> tuple[str, int]:
        """A setting, and how many sequences the largest micro-batch of a rank has by it; `stage` is Lightning's."""


@runtime_checkable
class NumbersSamples(Protocol):
    """A data module whose training batches say which samples they hold, so that what was stored of one is found again.

    Attributes:
        samples_consumed: how many have been trained on.
        document_attention: whether batches have `document`.
    """

    samples_consumed: int
    document_attention: bool

    def fingerprint(self) -> dict[str, str | int]:
        """What decides, with a sample's number, which tokens it has; the names are those of settings."""

    def batch_size_after(self, samples: int) -> int:
        """Sequences of the optimizer step that follows the first `samples`, over all ranks."""


@runtime_checkable
class SpellsBytes(Protocol):
    """A data module whose loss can be reported by domain and per byte of text."""

    domains: list[str]
    vocab_size: int

    def token_byte_lengths(self) -> Tensor:
        """`[V]` bytes of text each token id spells."""


@runtime_checkable
class SpellsTokens(Protocol):
    """A data module that knows what its token ids stand for."""

    def token_spellings(self) -> list[bytes]:
        """`[V]` the bytes of text that each token id stands for."""


@runtime_checkable
class HasTokenizer(Protocol):
    """A data module whose checkpoints are to hold the tokenizer, so that others can generate and evaluate with them."""

    def tokenizer_json(self) -> str:
        """In the `tokenizers` library's format."""
