"""Parameters and buffers that no module declares end in an error that names them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nlgmoe.checkpoint.entries import entry_shapes, local_entries
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.model.initialisation import initialise
from nlgmoe.optim.optimizer import AdamWConfig, build_optimizer

CONFIG = GPTConfig(61, 16, 2, 16, 2, moe=MoEConfig(4))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((16,), 7.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def with_norm(norm: nn.Module) -> GPT:
    model = GPT(CONFIG)
    model.blocks[0].ffn_norm = norm
    return model


@pytest.mark.parametrize(
    "use", [lambda model: initialise(model, CONFIG, 0), lambda model: build_optimizer(model, AdamWConfig())]
)
def test_undeclared_parameter_is_refused_by_name(use: Callable[[GPT], Any]) -> None:
    with pytest.raises(
        ValueError, match=r"^blocks.0.ffn_norm.gain: Scale does not declare its parameter gain; add roles = "
    ):
        use(with_norm(Scale()))


def test_buffer_that_no_checkpoint_would_hold_is_refused_by_name() -> None:
    for use in (entry_shapes, lambda model: list(local_entries(model))):
        with pytest.raises(
            ValueError, match=r"^blocks.0.ffn_norm.running_mean: checkpoints hold persistent buffers of a Router"
        ):
            use(with_norm(nn.BatchNorm1d(16, affine=False)))
