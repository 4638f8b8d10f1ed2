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


def fit(
    folder: Path, factors: dict[str, float], steps: int, path: Path | None = None
) -> tuple[dict[str, Tensor], float]:
    """Train; save the first step. Returns weights and the logged rate of the last step."""
    module = MoEGPTModule(CONFIG, AdamWConfig(lr=1e-3, weight_decay=0.5, lr_scale=factors))
    run = trainer(folder, SaveAt(1, folder / "one.ckpt"), max_steps=steps)
    run.fit(module, SyntheticData(), ckpt_path=path)
    return {name: value.double() for name, value in module.gpt.state_dict().items()}, float(
        run.callback_metrics["train/lr"]
    )


def assert_steps_are_scaled(start: dict[str, Tensor], plain: dict[str, Tensor], scaled: dict[str, Tensor]) -> None:
    for name, before in start.items():
        factor = next((factor for part, factor in FACTORS.items() if is_frozen(name, (part,))), 1.0)  # type: ignore[arg-type]
        step, found = plain[name] - before, scaled[name] - before
        assert torch.allclose(found, factor * step, rtol=1e-3, atol=1e-7), name
        assert factor != 1 or torch.equal(found, step)


def test_lr_scale_scales_steps_of_a_component_and_not_the_logged_rate(tmp_path: Path) -> None:
    start = {name: value.double() for name, value in MoEGPTModule(CONFIG).gpt.state_dict().items()}
    plain, rate = fit(tmp_path, {}, 1)
    scaled, logged = fit(tmp_path, FACTORS, 1)
    assert rate == logged == pytest.approx(1e-3)
    assert_steps_are_scaled(start, plain, scaled)


def test_lr_scale_is_the_configurations_after_a_resume_and_moments_the_checkpoints(tmp_path: Path) -> None:
    after_one, _ = fit(tmp_path, {}, 1)
    path = (tmp_path / "one.ckpt").rename(tmp_path / "start.ckpt")
    plain, _ = fit(tmp_path, {}, 2, path)
    scaled, _ = fit(tmp_path, FACTORS, 2, path)
    assert_steps_are_scaled(after_one, plain, scaled)
