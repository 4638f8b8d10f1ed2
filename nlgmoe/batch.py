"""The interface between data and training: the batch."""

from typing import NotRequired, TypedDict, cast

from torch import Tensor


class Batch(TypedDict):
    """A micro-batch of B sequences of T tokens.

    Attributes:
        tokens: `[B, T]` int64, the model's input.
        targets: `[B, T]` int64, the token to predict at each position; a valid id even where the loss is masked.
        token_mask: `[B, T]` bool, False at padding.
        domain: `[B]` int64, index into the data module's `domains`.
        padded: true if `token_mask` contains a False; optional, saves a synchronisation with the GPU.
        loss_mask: `[B, T]` bool, False where a position's loss does not count, padding included; absent if it equals
            `token_mask`. Such positions are read and routed like all others.
        document: `[B, T]` int64, document number of each position; present if attention is limited to a document.
        samples: B sample numbers of the run, on the host; needed by `OfflineTeacher`.
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
