"""Generation against plain re-reading, and loss by domain against plain arithmetic."""

import math

import pytest
import torch

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.eval.generation import generate
from nlgmoe.eval.perplexity import DomainLoss
from nlgmoe.model.gpt import GPT

MODEL = GPT(GPTConfig(61, 24, 4, 32, 2, init_std=0.1, moe=MoEConfig([2, 4], mlp_type="residual")), seed=3).eval()
PROMPT = torch.tensor([[5, 9, 2], [7, 7, 1]])


def test_greedy_tokens_are_those_of_reading_everything_again() -> None:
    tokens = PROMPT
    for _ in range(12):
        tokens = torch.cat([tokens, MODEL.logits(MODEL(tokens).hidden[:, -1]).argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(MODEL, PROMPT, 12, temperature=0), tokens)
    alone = generate(MODEL, PROMPT[:1], 12, temperature=0)
    assert torch.equal(alone, tokens[:1])  # a sequence does not depend on its neighbours


def test_sampling_is_seeded_and_follows_the_distribution() -> None:
    a, b, c = (generate(MODEL, PROMPT, 12, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    probs = MODEL.logits(MODEL(PROMPT[:1]).hidden[:, -1]).softmax(-1)[0]
    many = generate(MODEL, PROMPT[:1].expand(20_000, 3), 1)[:, -1]
    share = torch.bincount(many, minlength=61) / 20_000
    assert (share - probs).abs().max() < 0.015


def test_top_k_and_temperature_limit_the_choice() -> None:
    logits = MODEL.logits(MODEL(PROMPT[:1]).hidden[:, -1])[0]
    allowed = set(logits.topk(3).indices.tolist())
    sampled = set(generate(MODEL, PROMPT[:1].expand(2000, 3), 1, top_k=3)[:, -1].tolist())
    assert sampled == allowed
    assert set(generate(MODEL, PROMPT[:1].expand(500, 3), 1, temperature=1e-4)[:, -1].tolist()) == {
        int(logits.argmax())
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 22}, "25 tokens, but the model's seq_len is 24"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature >= 0"),
        ({"max_new_tokens": 1, "top_k": 0}, "top_k >= 1"),
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature >= 0"),
    ],
)
def test_impossible_requests_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(MODEL, PROMPT, **settings)


@pytest.mark.parametrize("prompt", [PROMPT[:, :0], PROMPT[0], PROMPT.float(), PROMPT - 9, PROMPT + 60])
def test_impossible_prompts_are_refused(prompt: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="prompt"):
        generate(MODEL, prompt, 1)
    with pytest.raises(ValueError, match="training mode"):
        generate(GPT(MODEL.config), PROMPT, 1)


def test_loss_and_bits_per_byte_by_domain() -> None:
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
