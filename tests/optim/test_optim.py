"""Schedules against literal numbers, frozen parts and moments by name."""

import math
import re
from typing import Any, get_args

import pytest
import torch

from nlgmoe.checkpoint.entries import optimizer_from_entries, optimizer_to_entries
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.balance import router_losses
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.muon import MuonConfig
from nlgmoe.optim.optimizer import AdamWConfig, build_optimizer, freeze
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum, learning_rate
from nlgmoe.roles import Component

COSINE = LearningRateSchedule("cosine", min_lr=1e-6, warmup_tokens=375_000_000, decay_tokens=300_000_000_000)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.0),
        (37_500_000, 3e-5),
        (375_000_000, 3e-4),
        (150_187_500_000, (3e-4 + 1e-6) / 2),  # half-way between warm-up and end
        (75_281_250_000, 1e-6 + 299e-6 * (0.5 + math.sqrt(0.125))),  # a quarter of the way
        (300_000_000_000, 1e-6),
        (330_000_000_000, 1e-6),
    ],
)
def test_cosine_schedule_is_that_of_the_papers_350m_pr_moe(tokens: int, expected: float) -> None:
    assert learning_rate(tokens, 3e-4, COSINE) == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("part", get_args(Component))
def test_frozen_parts_keep_their_weights_and_all_others_learn(part: Component) -> None:
    model = GPT(GPTConfig(61, 16, 2, 16, 2, tied_embeddings=False, moe=MoEConfig(2, mlp_type="residual")))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    freeze(model, (part,))
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-2, frozen=(part,)))
    for _ in range(2):
        output = model(torch.arange(32).view(2, 16), noise_key=(0, 0, 0))
        (model.logits(output.hidden).square().mean() + router_losses(output.routings)[0]).backward()
        without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        optimizer.step()
        optimizer.zero_grad()
    kept = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    pattern = {
        "router": r"blocks\.1\.moe\.router\.",
        "experts": r"blocks\.1\.moe\.experts\.",
        "attention": r"blocks\.[01]\.attention\.",
        "ffn": r"blocks\.0\.ffn\.|blocks\.1\.moe\.(shared_expert|coefficient)\.",
        "norms": r"(blocks\.[01]\.(attention|ffn)|final)_norm\.",
        "embeddings": r"(token_embedding|position_embedding|head)\.",
    }[part]
    assert kept == without == {name for name in before if re.match(pattern, name)}
    assert set(optimizer.state) == {parameter for name, parameter in model.named_parameters() if name not in kept}


def test_moments_are_restored_by_name_whatever_the_groups() -> None:
    """Without the embeddings the first group is the one without decay; a checkpoint of several ranks has it last."""
    model = GPT(GPTConfig(61, 16, 2, 16, 2, moe=MoEConfig(2)))
    freeze(model, ("embeddings",))
    saved, loaded = (build_optimizer(model, AdamWConfig(frozen=("embeddings",))) for _ in range(2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    saved.step()
    entries, groups = optimizer_to_entries(saved.state_dict(), dict(model.named_parameters()))
    assert [group["name"] for group in groups] == ["no_decay", "decay"]
    loaded.load_state_dict(optimizer_from_entries(entries, groups[::-1]))
    assert all(torch.equal(loaded.state[p]["exp_avg"], saved.state[p]["exp_avg"]) for p in trained)


def test_constant_and_wsd_schedules_by_hand() -> None:
    constant = LearningRateSchedule("constant", warmup_tokens=100)
    assert [learning_rate(t, 1.0, constant) for t in (0, 50, 100, 10**12)] == [0.0, 0.5, 1.0, 1.0]
    wsd = LearningRateSchedule("wsd", min_lr=0.2, warmup_tokens=100, decay_tokens=1000, cooldown_tokens=400)
    values = [learning_rate(t, 1.0, wsd) for t in (50, 100, 600, 800, 900, 1000, 2000)]
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.6, 0.4, 0.2, 0.2])


@pytest.mark.parametrize(
    ("kind", "settings"),  # the message names the first
    [
        (SequenceCurriculum, {"tokens": True}),
        (SequenceCurriculum, {"tokens": 1000.5}),
        (SequenceCurriculum, {"start": 84, "tokens": 1}),
        (LearningRateSchedule, {"shape": "Cosine", "decay_tokens": 100}),
        (LearningRateSchedule, {"decay_tokens": 10, "shape": "cosine", "warmup_tokens": 10}),
        (LearningRateSchedule, {"shape": "constant", "decay_tokens": 10}),
        (LearningRateSchedule, {"cooldown_tokens": 200, "shape": "wsd", "decay_tokens": 100}),
        (AdamWConfig, {"lr": 0.0}),
        (AdamWConfig, {"lr_scale": {"gate": 2.0}}),
        (AdamWConfig, {"lr_scale": {"router": 0.0}}),
        (AdamWConfig, {"lr_scale": {"norms": 2.0}, "frozen": ("norms",)}),
        (MuonConfig, {"momentum": 1.0}),
    ],
)
def test_schedules_and_optimizer_refuse_impossible_settings(kind: type, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"\b{next(iter(settings))}\b"):
        kind(**settings)
