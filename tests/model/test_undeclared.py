"""Parameters and buffers that no module declares end in an error that names them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nlgmoe.checkpoint.layout import entry_shapes, local_entries
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.router import Router
from nlgmoe.model.gpt import GPT
from nlgmoe.model.initialisation import initialise
from nlgmoe.optim.param_groups import AdamWConfig, build_adamw

CONFIG = GPTConfig(61, 16, 2, 16, 2, moe=MoEConfig(4))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((16,), 7.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class DeclaredScale(Scale):
    roles = {"gain": "scale"}  # noqa: RUF012


def with_norm(norm: nn.Module) -> GPT:
    model = GPT(CONFIG)
    model.blocks[0].ffn_norm = norm
    return model


USES: dict[str, Callable[[GPT], Any]] = {
    "initial values": lambda model: initialise(model, CONFIG, 0),
    "weight decay": lambda model: build_adamw(model, AdamWConfig()),
}


@pytest.mark.parametrize("use", USES)
def test_a_parameter_that_no_module_declares(use: str) -> None:
    with pytest.raises(
        ValueError, match=r"^blocks.0.ffn_norm.gain: Scale does not declare its parameter gain; add roles = "
    ):
        USES[use](with_norm(Scale()))
    misspelt = Scale()
    misspelt.roles = {"gain": "scales"}
    with pytest.raises(ValueError, match=r"^blocks.0.ffn_norm.gain: Scale declares gain as 'scales'; a role is one of"):
        USES[use](with_norm(misspelt))


def test_a_declared_parameter() -> None:
    model = with_norm(DeclaredScale())
    initialise(model, CONFIG, 0)
    assert model.get_parameter("blocks.0.ffn_norm.gain").tolist() == [1.0] * 16
    decayed, other = build_adamw(model, AdamWConfig()).param_groups
    assert "blocks.0.ffn_norm.gain" in other["param_names"]
    assert "blocks.0.ffn_norm.gain" not in decayed["param_names"]


@pytest.mark.parametrize("use", [entry_shapes, lambda model: list(local_entries(model))])
def test_a_buffer_that_no_checkpoint_would_hold(use: Callable[[GPT], Any]) -> None:
    router = Router(4)
    router.register_buffer("table", torch.zeros(61), persistent=False)
    for module, name in ((nn.BatchNorm1d(16, affine=False), "running_mean"), (router, "table")):
        with pytest.raises(
            ValueError, match=rf"^blocks.0.ffn_norm.{name}: checkpoints hold persistent buffers of a Router"
        ):
            use(with_norm(module))
