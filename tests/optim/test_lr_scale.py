"""Rates by component: the step of a component is so many times as long, the logged rate stays, a resume takes new factors."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.module import MoEGPTModule
from nlgmoe.optim.optimizer import AdamWConfig, is_frozen
from tests.support.synthetic import SyntheticData
from tests.support.trainers import SaveAt, trainer

CONFIG = GPTConfig(61, 16, 4, 32, 2, moe=MoEConfig(4, mlp_type="residual"))
FACTORS: dict[str, float] = {"router": 0.25, "experts": 3.0}


def weights(module: MoEGPTModule) -> dict[str, Tensor]:
    return {name: value.double() for name, value in module.gpt.state_dict().items()}


def fit(folder: Path, factors: dict[str, float], steps: int, path: Path | None) -> dict[str, Tensor]:
    """Train; save the first step."""
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
        start, steps = fit(tmp_path, {}, 1, None), 2
        path = (tmp_path / "one.ckpt").rename(tmp_path / "start.ckpt")
    plain, scaled = (fit(tmp_path, factors, steps, path) for factors in ({}, FACTORS))
    for name, before in start.items():
        factor = next((factor for part, factor in FACTORS.items() if is_frozen(name, (part,))), 1.0)  # type: ignore[arg-type]
        step, found = plain[name] - before, scaled[name] - before
        assert torch.allclose(found, factor * step, rtol=1e-3, atol=1e-7), name
        assert factor != 1 or torch.equal(found, step)
