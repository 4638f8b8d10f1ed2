"""The seam between data and training: what a batch is, and what the module asks of a data module."""

from __future__ import annotations

from typing import NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor


class Batch(TypedDict):
    """What a data module yields; B sequences of T tokens.

    Attributes:
        tokens: `[B, T]` int64, what the model reads.
        targets: `[B, T]` int64, what it shall predict at each position.
        token_mask: `[B, T]` bool, False at padding.
        domain: `[B]` int64, index into the data module's `domains`.
        padded: whether `token_mask` has a False; not needed, but to look for one on a GPU is to wait for it.
    """

    tokens: Tensor
    targets: Tensor
    token_mask: Tensor
    domain: Tensor
    padded: NotRequired[bool]


@runtime_checkable
class CountsSamples(Protocol):
    """A data module that resumes: it is told how many samples have been trained on."""

    def advance(self, samples: int) -> None:
        """Count `samples` more, over all ranks."""


@runtime_checkable
class SpellsBytes(Protocol):
    """A data module whose loss can be reported by domain and per byte of text."""

    domains: list[str]
    vocab_size: int

    def token_byte_lengths(self) -> Tensor:
        """`[V]` bytes of text each token id spells."""
