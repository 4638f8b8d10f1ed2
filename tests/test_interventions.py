"""The recipes for changed routings, against models that are changed in the same way by hand."""

import pytest
import torch
from interventions import around, intervened, replay, without
from torch import Tensor

from nlgmoe import GPT, GPTConfig, MoEConfig

TOKENS = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(0))


def model_of(top_k: int) -> GPT:
    return GPT(GPTConfig(61, 16, 2, 16, 2, init_std=0.3, moe=MoEConfig(4, top_k=top_k))).eval()


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    return model.logits(model(TOKENS).hidden)


@pytest.mark.parametrize("top_k", [1, 2])
def test_expert_switched_off_is_one_that_returns_zero(top_k: int) -> None:
    model, before = model_of(top_k), logits(model_of(top_k))
    with intervened(model, 1, without(2)):
        off = logits(model)
    assert torch.equal(logits(model), before), "the hook is still there"
    experts = model.blocks[1].moe.experts
    with torch.no_grad():
        experts.down_weight[2], experts.down_bias[2] = 0, 0
    torch.testing.assert_close(off, logits(model), rtol=1e-5, atol=1e-5)
    assert (off - before).abs().max() > 1e-3


def test_routing_around_an_expert_is_the_routing_of_the_others() -> None:
    model = model_of(2)
    with torch.no_grad():
        before = model(TOKENS).routings[0]
        with intervened(model, 1, around(2)):
            routing = model(TOKENS).routings[0]
    rest = before.probs.index_fill(1, torch.tensor([2]), 0)
    assert torch.equal(routing.expert.sort(dim=1).values, rest.topk(2, dim=1).indices.sort(dim=1).values)
    others = ~(before.expert == 2).any(dim=1)
    torch.testing.assert_close(routing.weight[others], before.weight[others])
    torch.testing.assert_close(routing.weight.sum(dim=1), torch.ones(len(rest)))


def test_a_replayed_routing_does_not_depend_on_the_router() -> None:
    model, before = model_of(1), logits(model_of(1))
    with torch.no_grad():
        recorded = model(TOKENS).routings[0]
        model.blocks[1].moe.router.weight.neg_()
    assert not torch.equal(logits(model), before)
    with intervened(model, 1, replay(recorded)):
        assert torch.equal(logits(model), before)
