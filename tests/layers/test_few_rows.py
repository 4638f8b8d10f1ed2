"""The few rows of generation, which experts compute one by one, against one grouped product."""

import pytest
import torch

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers import experts
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.router import RoutingContext
from nlgmoe.model.gpt import GPT


def layer(moe: MoEConfig) -> MoELayer:
    built = GPT(GPTConfig(61, 16, 2, 16, 2, init_std=0.3, moe=moe), seed=5).eval().blocks[1].moe
    assert isinstance(built, MoELayer)
    for parameter in built.parameters():  # biases too
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3
    return built


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(8, top_k=3, mlp_type="residual", residual_mix="sum"),
        MoEConfig(2, eval_token_dropping=True, eval_capacity_factor=0.5, min_capacity=1),
    ],
)
@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_moe_layer_computes_few_rows_as_it_does_many(
    moe: MoEConfig, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, mask = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([[True], [False]])
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        results = []
        for few in (8, 0):
            monkeypatch.setattr(experts, "FEW_ROWS", few)
            assert layer(moe).experts._choose_product(x[0]) == ("loop" if few else "grouped_mm")
            results += [layer(moe)(x)[0], layer(moe)(x, RoutingContext(mask=mask))[0]]
    for few_rows, many in zip(results[:2], results[2:], strict=True):
        assert few_rows.dtype == many.dtype
        torch.testing.assert_close(few_rows, many, rtol=2e-2 if half else 1e-6, atol=2e-2 if half else 1e-6)


@torch.no_grad()
def test_experts_that_are_not_chosen_are_not_read() -> None:
    moe, x = layer(MoEConfig(8, top_k=2)), torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(2))
    expected, routing = moe(x)
    idle = set(range(8)) - set(routing.expert.flatten().tolist())
    assert len(idle) >= 4
    for parameter in moe.experts.parameters():
        parameter[sorted(idle)] = float("nan")
    assert torch.equal(moe(x)[0], expected)
