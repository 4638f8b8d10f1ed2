"""The few rows of generation, which experts compute one by one, against one grouped product."""

import torch

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.moe import MoELayer
from nlgmoe.model.gpt import GPT


def layer(moe: MoEConfig) -> MoELayer:
    built = GPT(GPTConfig(61, 16, 2, 16, 2, init_std=0.3, moe=moe), seed=5).eval().blocks[1].moe
    assert isinstance(built, MoELayer)
    for parameter in built.parameters():  # biases too
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3
    return built


@torch.no_grad()
def test_experts_that_are_not_chosen_are_not_read() -> None:
    moe, x = layer(MoEConfig(8, top_k=2)), torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(2))
    expected, routing = moe(x)
    idle = set(range(8)) - set(routing.expert.flatten().tolist())
    assert len(idle) >= 4
    for parameter in moe.experts.parameters():
        parameter[sorted(idle)] = float("nan")
    assert torch.equal(moe(x)[0], expected)
