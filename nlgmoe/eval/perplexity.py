"""Loss and bits per byte by domain, summed over batches and ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class DomainLoss(Metric):
    """Sums of token losses by domain.

    Bits per byte divides by the bytes of the *original text* that the evaluated tokens spell, so models with different
    tokenizers compare. An end-of-document token spells no byte but its loss counts: documents have to end.

    Args:
        domains: names; a batch's domain ids index them.
        token_bytes: `[V]` bytes each token id spells.
    """

    nats: Tensor
    tokens: Tensor
    bytes: Tensor
    token_bytes: Tensor

    def __init__(self, domains: list[str], token_bytes: Tensor) -> None:
        super().__init__()
        self.domains = domains
        self.register_buffer("token_bytes", token_bytes.double(), persistent=False)
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros(len(domains), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, targets: Tensor, mask: Tensor, domain: Tensor) -> None:
        """Add a batch.

        Args:
            losses: `[B, T]` nats.
            targets: `[B, T]` token ids.
            mask: `[B, T]` bool, False where a token does not count.
            domain: `[B]` domain ids.
        """
        counted = mask.double()
        for name, per_token in (
            ("nats", losses.double()),
            ("tokens", torch.ones_like(counted)),
            ("bytes", self.token_bytes[targets]),
        ):
            getattr(self, name).index_add_(0, domain, (per_token * counted).sum(dim=1))

    def compute(self) -> dict[str, Tensor]:
        """`loss` (nats per token), `loss/DOMAIN`, `bits_per_byte`, `bits_per_byte/DOMAIN`; domains not seen are left out."""
        results = {
            "loss": self.nats.sum() / self.tokens.sum(),
            "bits_per_byte": self.nats.sum() / math.log(2) / self.bytes.sum(),
        }
        for index, name in enumerate(self.domains):
            if self.tokens[index] > 0:
                results[f"loss/{name}"] = self.nats[index] / self.tokens[index]
                results[f"bits_per_byte/{name}"] = self.nats[index] / math.log(2) / self.bytes[index]
        return results
