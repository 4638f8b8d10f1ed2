"""Settings without effect are named, and have none."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nlgmoe import GPT, GPTConfig, HashRouterConfig, MLAConfig, MoEConfig, RouterConfig, SigmoidRouterConfig, Yarn
from nlgmoe.layers.balance import add_router_losses
from nlgmoe.layers.router import TopKRouter
from nlgmoe.module import MoEGPTModule
from nlgmoe.pyramid import experts_at
from nlgmoe.without_effect import without_effect
from tests.support.synthetic import SyntheticData
from tests.support.trainers import trainer

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # of the model, of its experts; the line
    "nothing": ({"rope_theta": 1e4, "rotary_dim": 4}, {"token_dropping": False}, ""),
    "rotary": ({"rotary_dim": 4, "rotary_scaling": Yarn(2.0, 8)}, {}, "rotary_dim=4 (without rope_theta); rotary_scaling="),
    "attention": (
        {"attention": MLAConfig(8, 8, 4, 8), "rope_theta": 1e4, "qk_norm": "head"},
        {},
        "qk_norm=head (with MLAConfig)",
    ),
    "router": ({}, {"router": HashRouterConfig(), "token_dropping": False}, "moe.token_dropping=False (with HashRouterConfig)"),
    "standard": ({}, {"residual_mix": "sum"}, "moe.residual_mix=sum (with mlp_type=standard)"),
    "dropless": (
        {},
        {"token_dropping": False, "train_capacity_factor": 9.0, "random_token_selection": False},
        "moe.train_capacity_factor=9.0 (without token_dropping); moe.random_token_selection=False (unless top_k is 1 and",
    ),
    "top-4": ({}, {"top_k": 4, "second_expert": "argmax"}, "moe.second_expert=argmax (unless top_k is 2)"),
    "unbalanced": ({}, {"router": SigmoidRouterConfig(), "loss_coeff": 0.5}, "moe.loss_coeff=0.5 (with SigmoidRouterConfig)"),
}  # fmt: skip


def config_of(model: dict[str, Any], moe: dict[str, Any]) -> GPTConfig:
    return GPTConfig(64, 16, 2, 16, 2, moe=MoEConfig(8, **moe), **model)


@pytest.mark.parametrize("case", CASES)
def test_settings_without_effect_are_named_with_their_reason(case: str) -> None:
    *settings, line = CASES[case]
    found = without_effect(config_of(*settings))
    assert found.startswith(f"model.config has settings without effect: {line}" if line else "") and bool(
        found
    ) == bool(line)


@dataclass(frozen=True)
class UnreadingConfig(RouterConfig):
    """The paper's router, which is said to read no setting."""

    def build(self, config: GPTConfig, block: int) -> TopKRouter:
        assert config.moe is not None
        return TopKRouter(config.moe, config.hidden_size, experts_at(config, block), block)


def test_settings_that_a_part_does_not_read_change_nothing() -> None:
    moe = MoEConfig(4, router=UnreadingConfig())
    unread = replace(moe, train_capacity_factor=0.3, noise="jitter", gate_scale=3.0, loss_coeff=1.0, z_loss_coeff=1.0)
    tokens, results = torch.arange(64).view(4, 16), []
    for each in (moe, unread):
        model = GPT(GPTConfig(64, 16, 2, 16, 2, moe=each), seed=0)
        output = model(tokens, noise_key=(0, 0, 0))
        results.append((output.hidden, add_router_losses(torch.zeros(()), each, output.routings)[0]))
    assert all(map(torch.equal, *results)) and results[0][1] == 0


def test_a_fit_names_settings_without_effect(tmp_path: Path) -> None:
    config = config_of(*CASES["top-4"][:2])
    with pytest.warns(UserWarning, match=r"without effect: moe\.second_expert=argmax \(unless top_k is 2\)"):
        trainer(tmp_path, max_steps=1).fit(MoEGPTModule(config), SyntheticData())
