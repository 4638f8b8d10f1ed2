"""Loss by domain, compared with plain arithmetic."""

import math

import pytest
import torch

from nlgmoe.eval.perplexity import DomainLoss


def test_evaluation_gives_loss_and_bits_per_byte_by_domain() -> None:
    token_bytes = torch.tensor([0, 2, 4])  # token 0 ends a document: no byte
    metric = DomainLoss(["a", "b", "unseen"], token_bytes, shares=[0.1, 0.3, 0.6])
    losses = torch.tensor([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]])
    targets = torch.tensor([[1, 0, 2], [2, 2, 1]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    metric.update(losses[:1], targets[:1], mask[:1], torch.tensor([0]))
    metric.update(losses[1:], targets[1:], mask[1:], torch.tensor([1]))
    results = {name: float(value) for name, value in metric.compute().items()}
    assert results == pytest.approx(
        {
            "loss": 18 / 5,
            "perplexity": math.exp(18 / 5),
            "bits_per_byte": 18 / math.log(2) / 12,
            "loss/a": 1.5,
            "perplexity/a": math.exp(1.5),
            "bits_per_byte/a": 3 / math.log(2) / 2,
            "loss/b": 5.0,
            "perplexity/b": math.exp(5.0),
            "bits_per_byte/b": 15 / math.log(2) / 10,
            "blend_loss": (0.1 * 1.5 + 0.3 * 5.0) / 0.4,
        }
    )
