"""The interface between data and training: the batch, and the protocols of a data module that the module uses."""

from __future__ import annotations

from typing import NotRequired, Protocol, TypedDict, cast, runtime_checkable

from torch import Tensor


class Batch(TypedDict):
    """A micro-batch of B sequences of T tokens.

    Attributes:
        tokens: `[B, T]` int64, the model's input.
        targets: `[B, T]` int64, the token to predict at each position.
        token_mask: `[B, T]` bool, False at padding.
        domain: `[B]` int64, index into the data module's `domains`.
        padded: true if `token_mask` contains a False; optional, avoids a wait for the GPU to find out.
        loss_mask: `[B, T]` bool, False where a position's loss does not count, padding included; absent if it equals
            `token_mask`. Such positions are read and routed like all others.
        document: `[B, T]` int64, document number of each position; present if attention is limited to a document.
        samples: B sample numbers of the run, on the host; present in training with a data module that `HasSampleNumbers`.
    """

    tokens: Tensor
    targets: Tensor
    token_mask: Tensor
    domain: Tensor
    padded: NotRequired[bool]
    loss_mask: NotRequired[Tensor]
    document: NotRequired[Tensor]
    samples: NotRequired[list[int]]


def token_mask_or_none(batch: Batch) -> Tensor | None:
    """Return the token mask, or None if nothing is masked, which makes attention faster."""
    mask = batch["token_mask"]
    padded = batch.get("padded")
    return mask if (not mask.all() if padded is None else padded) else None


def loss_mask(batch: Batch) -> Tensor:
    """Return the `[B, T]` bool mask that is False where a position's loss does not count."""
    return batch.get("loss_mask", batch["token_mask"])


def truncate(batch: Batch, length: int) -> Batch:
    """Truncate every sequence to its first `length` positions."""
    truncated = {
        name: value[:, :length] if isinstance(value, Tensor) and value.dim() == 2 else value
        for name, value in batch.items()
    }
    return cast(Batch, truncated)


@runtime_checkable
class TracksSamples(Protocol):
    """A data module that can resume: it counts the samples trained on.

    Attributes:
        samples_consumed: over all ranks.
    """

    samples_consumed: int

    def advance(self, samples: int) -> None:
        """Count `samples` more, over all ranks."""


@runtime_checkable
class HasPlannedBatchSize(Protocol):
    """A data module whose steps may grow."""

    def planned_batch_size(self) -> int | None:
        """Return the sequences of the next optimizer step over all ranks; None if all steps have the same size."""


@runtime_checkable
class HasEqualBatches(Protocol):
    """A data module that knows whether all ranks train on micro-batches of one size.

    If they do, expert parallelism need not wait for the number of rows that it sends (`MoELayer.equal_batches`).
    """

    def has_equal_batches(self) -> bool:
        """Return True if each micro-batch of training has as many tokens on every rank, padding included."""


@runtime_checkable
class HasLargestBatch(Protocol):
    """A data module that knows the size of its micro-batches in advance."""

    def largest_batch(self, stage: str) -> tuple[str, int]:
        """Return a setting, and the sequences of a rank's largest micro-batch that it leads to, in Lightning's `stage`."""


@runtime_checkable
class HasSampleNumbers(Protocol):
    """A data module whose training batches contain sample numbers, by which stored teacher logits are looked up.

    Attributes:
        samples_consumed: number of samples trained on.
        document_attention: true if batches contain `document`.
    """

    samples_consumed: int
    document_attention: bool

    def fingerprint(self) -> dict[str, str | int]:
        """Return the settings, by name, that determine a sample's tokens together with its number."""

    def batch_size_after(self, samples: int) -> int:
        """Return the sequences of the optimizer step after the first `samples`, over all ranks."""


@runtime_checkable
class HasTokenByteLengths(Protocol):
    """A data module whose loss can be logged by domain and per byte of text."""

    domains: list[str]
    vocab_size: int

    def token_byte_lengths(self) -> Tensor:
        """Return the `[V]` numbers of text bytes of each token id."""


@runtime_checkable
class HasTokenTexts(Protocol):
    """A data module that knows the text of its token ids."""

    def token_spellings(self) -> list[bytes]:
        """Return the text of each token id, `[V]`, as bytes."""


@runtime_checkable
class HasTokenizer(Protocol):
    """A data module whose tokenizer is saved in checkpoints, for generation and evaluation."""

    def tokenizer_json(self) -> str:
        """Return the tokenizer in the format of the `tokenizers` library."""
