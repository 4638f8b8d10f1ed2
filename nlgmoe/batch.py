"""The interface between data and training: the batch."""

from typing import NotRequired, TypedDict, cast

from torch import Tensor


class Batch(TypedDict):
    """A micro-batch of B sequences of T tokens."""

    tokens: Tensor  # [B, T] int64, the model's input
    targets: Tensor  # [B, T] int64, the token to predict at each position; a valid id even where the loss is masked
    token_mask: Tensor  # [B, T] bool, False at padding
    domain: Tensor  # [B] int64, index into the data module's `domains`
    padded: NotRequired[bool]  # true if `token_mask` contains a False; saves a synchronisation with the GPU
    # [B, T] bool, False where a position's loss does not count, padding included; absent if it equals `token_mask`. Such
    # positions are read and routed like all others.
    loss_mask: NotRequired[Tensor]
    document: NotRequired[Tensor]  # [B, T] int64, of each position; present if attention is limited to a document
    samples: NotRequired[list[int]]  # B sample numbers of the run, on the host; needed by `OfflineTeacher`


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
    cut = {name: value[:, :length] for name, value in batch.items() if isinstance(value, Tensor) and value.dim() == 2}
    return cast(Batch, {**batch, **cut})
