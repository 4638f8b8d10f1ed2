"""Parts that are frozen in a run: no gradient, no moment, an exact resume; and parts with a rate of their own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor

from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.routers import SigmoidRouterConfig
from nlgmoe.model.counting import count_parameters
from nlgmoe.model.gpt import GPT
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig, freeze
from nlgmoe.roles import Component, component_of
from tests.support.synthetic import SyntheticData
from tests.support.trainers import SaveAt, trainer

CONFIG = GPTConfig(61, 16, 4, 32, 2, hidden_dropout=0.1, moe=MoEConfig(4, mlp_type="residual", noise="jitter"))
CASES: dict[str, tuple[tuple[Component, ...], dict[str, Any]]] = {
    "tied embeddings": (("embeddings",), {}),
    "all but the router, recomputed": (
        ("experts", "attention", "ffn", "norms", "embeddings"),
        {"activation_checkpointing": True},
    ),
    "all but norms": (("router", "experts", "attention", "ffn", "embeddings"), {}),
}


def fit(
    folder: Path, frozen: tuple[Component, ...], steps: int, path: Path | None, *callbacks: Any, **settings: Any
) -> MoEGPTModule:
    module = MoEGPTModule(CONFIG, AdamWConfig(lr=1e-2, frozen=frozen), **settings)
    trainer(folder, *callbacks, max_steps=steps).fit(module, SyntheticData(), ckpt_path=path)
    return module


@pytest.mark.parametrize("case", CASES)
def test_frozen_parts_take_no_moments_and_a_run_with_them_is_resumed_exactly(case: str, tmp_path: Path) -> None:
    frozen, settings = CASES[case]

    def look(_: Any, module: Any, *__: Any) -> None:
        assert all((weight.grad is not None) == weight.requires_grad for weight in module.gpt.parameters())

    first = MoEGPTModule(CONFIG).gpt.state_dict()
    saves = SaveAt(2, tmp_path / "two.ckpt")
    whole = fit(tmp_path, frozen, 4, None, saves, LambdaCallback(on_before_optimizer_step=look), **settings)
    moved = {name for name, value in whole.gpt.state_dict().items() if not torch.equal(value, first[name])}
    trained = {name for name, weight in whole.gpt.named_parameters() if weight.requires_grad}
    assert moved == trained and 0 < len(trained) < len(first)
    assert list(find_problems(Checkpoint(tmp_path / "two.ckpt"))) == []
    stored = Checkpoint(tmp_path / "two.ckpt").tensors("optimizer").shapes
    assert {name.removeprefix("step/") for name in stored if name.startswith("step/")} == trained
    resumed = fit(tmp_path, frozen, 4, tmp_path / "two.ckpt", **settings)
    assert all(torch.equal(value, whole.gpt.state_dict()[name]) for name, value in resumed.gpt.state_dict().items())


@pytest.mark.parametrize("frozen", [("router",), ("experts",)])
def test_a_frozen_router_keeps_its_bias(frozen: tuple[Component, ...], tmp_path: Path) -> None:
    config = replace(CONFIG, moe=MoEConfig(4, top_k=2, router=SigmoidRouterConfig()))
    module = MoEGPTModule(config, AdamWConfig(lr=1e-2, frozen=frozen))
    trainer(tmp_path, max_steps=2).fit(module, SyntheticData())
    biases = [value for name, value in module.gpt.named_buffers() if name.endswith("router.bias")]
    assert len(biases) == 2 and all(bool(bias.any()) == (frozen != ("router",)) for bias in biases)


def test_a_parameter_has_one_component_for_the_optimizer_and_for_the_count() -> None:
    """The mixing coefficient is trained with the feed-forward layers, and a router's own norm with the router."""
    names = {
        "blocks.1.moe.coefficient.weight": "ffn",
        "blocks.1.moe.router.norm.weight": "router",
        "blocks.1.attention.query_norm.weight": "norms",
        "head.weight": "embeddings",
    }
    assert {name: component_of(name) for name in names} == names
    with pytest.raises(ValueError, match=r"extra\.weight belongs to no component"):
        component_of("extra.weight")
    config = replace(CONFIG, qk_norm="head", moe=MoEConfig(4, mlp_type="residual"))
    count, model = count_parameters(config), GPT(config)
    freeze(model, ["router"])
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    assert frozen == count.router == 2 * 4 * config.hidden_size


def test_frozen_refuses_to_leave_no_parameter_to_train(tmp_path: Path) -> None:
    dense, parts = replace(CONFIG, moe=None), ("attention", "ffn", "norms", "embeddings")
    message = r"frozen=\['attention', .* leaves no parameter to train; leave a component out"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1).fit(MoEGPTModule(dense, AdamWConfig(frozen=parts)), SyntheticData())


FACTORS: dict[str, float] = {"router": 0.25, "experts": 3.0}


def weights(module: MoEGPTModule) -> dict[str, Tensor]:
    return {name: value.double() for name, value in module.gpt.state_dict().items()}


def stepped(folder: Path, factors: dict[str, float], steps: int, path: Path | None) -> dict[str, Tensor]:
    module = MoEGPTModule(CONFIG, AdamWConfig(lr=1e-3, weight_decay=0.5, lr_scale=factors))
    run = trainer(folder, SaveAt(1, folder / "one.ckpt"), max_steps=steps)
    run.fit(module, SyntheticData(), ckpt_path=path)
    assert float(run.callback_metrics["train/lr"]) == pytest.approx(1e-3)
    return weights(module)


@pytest.mark.parametrize("resumed", [False, True])
def test_lr_scale_scales_steps_of_a_component_and_not_the_logged_rate(resumed: bool, tmp_path: Path) -> None:
    """A resumed run takes the moments from the checkpoint, and the factors from its own configuration."""
    start, steps, path = weights(MoEGPTModule(CONFIG)), 1, None
    if resumed:
        start, steps = stepped(tmp_path, {}, 1, None), 2
        path = (tmp_path / "one.ckpt").rename(tmp_path / "start.ckpt")
    plain, scaled = (stepped(tmp_path, factors, steps, path) for factors in ({}, FACTORS))
    for name, before in start.items():
        factor = next((factor for part, factor in FACTORS.items() if component_of(name) == part), 1.0)
        step, found = plain[name] - before, scaled[name] - before
        assert torch.allclose(found, factor * step, rtol=1e-3, atol=1e-7), name
        assert factor != 1 or torch.equal(found, step)
