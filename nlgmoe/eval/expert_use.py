"""A model's use of each expert on a text: the sum of the expert's weights over tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nlgmoe.batch import Batch, loss_mask
from nlgmoe.eval.perplexity import batch_losses
from nlgmoe.model.gpt import GPT
from nlgmoe.validation import RunError

CHUNK = 1024  # tokens whose logits exist at a time


@dataclass(frozen=True)
class ExpertUse:
    """The loss of a text, and the use of each expert.

    Attributes:
        loss: mean over tokens, nats.
        tokens: number of these tokens.
        weights: for each MoE layer, `[E]` sum over tokens of the expert's weight in the output.
    """

    loss: float
    tokens: int
    weights: list[Tensor]


@torch.no_grad()
def measure_use(model: GPT, batches: Iterable[Batch]) -> ExpertUse:
    """Read text with a model in evaluation mode."""
    total, tokens = 0.0, 0
    weights: list[Tensor] = []
    for batch in batches:
        losses, routings = batch_losses(model, batch, CHUNK)
        counted = loss_mask(batch)
        total += float(losses[counted].sum(dtype=torch.float64))
        tokens += int(counted.sum())
        weights = weights or [
            routing.weight.new_zeros(routing.num_experts, dtype=torch.float64) for routing in routings
        ]
        for sums, routing in zip(weights, routings, strict=True):
            sums.index_add_(0, routing.expert.flatten(), routing.weight.flatten().double())  # padding weighs 0
    if not tokens:
        raise RunError("there is no text to measure the use of experts on; give some")
    return ExpertUse(total / tokens, tokens, weights)
