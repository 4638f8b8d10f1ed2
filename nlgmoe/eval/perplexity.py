"""Loss, perplexity and bits per byte by domain, summed over batches and ranks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from nlgmoe.batch import Batch, loss_mask, token_mask_or_none
from nlgmoe.data.training_data import TrainingData
from nlgmoe.layers.losses import token_losses
from nlgmoe.layers.routing import Routing
from nlgmoe.model.gpt import GPT, GPTOutput

CHUNK = 1024  # tokens whose logits exist at a time, where no setting says so


def read_batch(gpt: GPT, batch: Batch) -> GPTOutput:
    """Apply the model to a batch on its device."""
    output: GPTOutput = gpt(batch["tokens"], token_mask_or_none(batch), documents=batch.get("document"))
    return output


def losses_of(gpt: GPT, output: GPTOutput, batch: Batch, chunk_size: int = CHUNK) -> Tensor:
    """Compute the loss of every token of a batch from the model's output, `[B, T]` nats; masked tokens have a loss too."""
    hidden, targets = output.hidden.flatten(0, 1), batch["targets"]
    losses = token_losses(hidden, gpt.unembedding, gpt.config.vocab_size, targets.flatten(), chunk_size)
    return losses.view_as(targets)


def batch_losses(gpt: GPT, batch: Batch, chunk_size: int) -> tuple[Tensor, list[Routing]]:
    """Compute the loss of every token of a batch, as `losses_of` does, and the routings."""
    output = read_batch(gpt, batch)
    return losses_of(gpt, output, batch, chunk_size), output.routings


class DomainLoss(Metric):
    """Sums token losses by domain.

    Bits per byte divides by the bytes of the *original text* of the evaluated tokens, so it compares models with different
    tokenizers. An end-of-document token has no bytes, but its loss counts.

    Args:
        domains: names, indexed by a batch's domain ids.
        token_bytes: `[V]` number of bytes of each token id.
        shares: weight of each domain in the training blend; None: there is no blend.
    """

    nats: Tensor
    tokens: Tensor
    bytes: Tensor
    token_bytes: Tensor
    shares: Tensor | None

    def __init__(self, domains: list[str], token_bytes: Tensor, shares: Sequence[float] | None = None) -> None:
        super().__init__()
        self.domains = domains
        self.register_buffer("token_bytes", token_bytes.double(), persistent=False)
        weights = None if shares is None else torch.tensor(shares, dtype=torch.float64)
        self.register_buffer("shares", weights, persistent=False)
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros(len(domains), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, targets: Tensor, mask: Tensor, domain: Tensor) -> None:
        """Add a batch: losses in nats, token ids and a mask, False where a token is not counted, `[B, T]`; domain ids `[B]`."""
        counted = mask.double()
        self.nats.index_add_(0, domain, (losses.double() * counted).sum(dim=1))
        self.tokens.index_add_(0, domain, counted.sum(dim=1))
        self.bytes.index_add_(0, domain, (self.token_bytes[targets] * counted).sum(dim=1))

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` (nats per token), `perplexity` (its exponential) and `bits_per_byte`, overall and as `NAME/DOMAIN`.

        Domains without tokens are omitted. With a blend, `blend_loss` is the mean of the domains' losses weighted by
        `shares`: the loss that training minimises.
        """
        results = {
            "loss": self.nats.sum() / self.tokens.sum(),
            "perplexity": (self.nats.sum() / self.tokens.sum()).exp(),
            "bits_per_byte": self.nats.sum() / math.log(2) / self.bytes.sum(),
        }
        for index, name in enumerate(self.domains):
            if self.tokens[index] > 0:
                results[f"loss/{name}"] = self.nats[index] / self.tokens[index]
                results[f"perplexity/{name}"] = results[f"loss/{name}"].exp()
                results[f"bits_per_byte/{name}"] = self.nats[index] / math.log(2) / self.bytes[index]
        if self.shares is not None:
            seen = self.tokens > 0
            shares = self.shares[seen] / self.shares[seen].sum()
            results["blend_loss"] = (shares * self.nats[seen] / self.tokens[seen]).sum()
        return results


class Evaluation:
    """The loss by domain of one evaluation. It is no submodule: `bf16-true` would turn its sums into bf16.

    `data` names the domains; None, another data module: one unnamed domain, no bytes.
    """

    def __init__(self, data: TrainingData | None, vocab_size: int) -> None:
        if data is None:
            self._loss = DomainLoss(["all"], torch.zeros(vocab_size))
        else:
            self._loss = DomainLoss(data.domains, data.token_byte_lengths(), data.domain_shares)
        self._has_domains = data is not None

    def update(self, losses: Tensor, batch: Batch) -> None:
        """Add the losses of a batch, `[B, T]` nats."""
        domain = batch["domain"] if self._has_domains else torch.zeros_like(batch["domain"])
        self._loss.to(losses.device).update(losses, batch["targets"], loss_mask(batch), domain)

    def compute(self) -> dict[str, Tensor]:
        """Return `DomainLoss.compute` over all batches and ranks, and begin anew. A collective."""
        results: dict[str, Tensor] = self._loss.compute()
        self._loss.reset()
        return results
