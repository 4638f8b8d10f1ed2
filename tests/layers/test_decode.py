"""A few tokens, decoded without sorting, against the same tokens sorted by expert."""

import pytest
import torch

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers import experts
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.router import RoutingContext
from nlgmoe.model.gpt import GPT


def layer(moe: MoEConfig) -> MoELayer:
    found = GPT(GPTConfig(61, 16, 2, 16, 2, init_std=0.3, moe=moe), seed=5).eval().blocks[1].moe
    assert isinstance(found, MoELayer)
    for parameter in found.parameters():  # biases too
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3
    return found


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(8),
        MoEConfig(8, top_k=2, mlp_type="residual"),
        MoEConfig(8, top_k=3, mlp_type="residual", residual_mix="sum"),
        MoEConfig(2, eval_token_dropping=True, eval_capacity_factor=0.5, min_capacity=1),
    ],
)
@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_few_tokens_get_what_they_get_among_many(moe: MoEConfig, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    decode = experts.Experts.decode
    monkeypatch.setattr(experts.Experts, "decode", lambda *args: (taken.append(1), decode(*args))[1])
    x, mask = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([[True], [False]])
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        results = []
        for few in (8, 0):
            monkeypatch.setattr(experts, "MAX_DECODE", few)
            results += [layer(moe)(x)[0], layer(moe)(x, RoutingContext(mask=mask))[0]]
    assert len(taken) == 2
    for one, other in zip(results[:2], results[2:], strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2 if half else 1e-6, atol=2e-2 if half else 1e-6)


@torch.no_grad()
def test_experts_that_are_not_hit_are_not_touched() -> None:
    moe, x = layer(MoEConfig(8, top_k=2)), torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(2))
    expected, routing = moe(x)
    idle = set(range(8)) - set(routing.expert.flatten().tolist())
    assert len(idle) >= 4
    for parameter in moe.experts.parameters():
        parameter[sorted(idle)] = float("nan")
    assert torch.equal(moe(x)[0], expected)


@torch.no_grad()
def test_few_tokens_are_decoded_where_the_host_waits_for_the_experts_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "cast_by_autocast", lambda x: x)  # there is no autocast for `meta`
    found = layer(MoEConfig(8)).experts
    few = {kind: torch.empty(4, 16, dtype=kind, device="meta") for kind in (torch.float32, torch.float64)}
    assert found.can_decode(few[torch.float64], 4)  # experts one by one
    assert not found.can_decode(few[torch.float32], 4)  # one grouped product
    with torch.enable_grad():
        assert not found.can_decode(few[torch.float64], 4)
    assert not found.can_decode(few[torch.float64], 9) and not found.can_decode(few[torch.float64], 0)
