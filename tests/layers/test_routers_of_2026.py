"""Quantile balancing, hashed choice, a weight of 1, the smooth rule: routings and updates worked out by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nlgmoe import (
    GPT,
    GPTConfig,
    HashedRouterConfig,
    MoEConfig,
    QuantileRouterConfig,
    RoutingContext,
    SigmoidRouterConfig,
    UnitWeightRouterConfig,
)
from nlgmoe.layers.routers.fixed import balanced_table
from nlgmoe.layers.routers.hashed import HashedRouter
from nlgmoe.layers.routers.quantile import BINS
from nlgmoe.layers.routers.sigmoid import SCORES, SigmoidRouter

DROPLESS: dict[str, Any] = {"token_dropping": False}


def router_of(moe: MoEConfig, width: int) -> Any:
    """Return the router of block 1, in fp64, whose logits are its input."""
    router = GPT(GPTConfig(61, 16, 2, width, 1, moe=moe)).blocks[1].moe.router.double()
    torch.nn.init.eye_(router.weight)
    return router


def expect(actual: Tensor, expected: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), torch.tensor(expected).double(), rtol=tolerance, atol=tolerance)


# ---- quantiles


def test_quantile_router_chooses_by_biased_scores_and_counts_the_biases_that_were_missing() -> None:
    router = router_of(MoEConfig(3, top_k=1, router=QuantileRouterConfig(), **DROPLESS), 3)
    router.bias.copy_(torch.tensor([-0.2, 0.1, 0.1]))
    scores = torch.tensor(
        [[0.9, 0.3, 0.5], [0.2, 0.7, 0.6]], dtype=torch.float64
    )  # biased: 0.7 0.4 0.6, and 0.0 0.8 0.7
    routing = router(scores.logit())
    assert routing.expert.tolist() == [[0], [1]]
    expect(routing.weight, [[0.9], [0.7]])
    # To exceed are 0.6 and 0.7: the biases that were missing are -0.3 0.3 0.1, and 0.5 0.0 0.1; bins of [-1.2, 1.1].
    bins = [[int((value + 1.2) / 2.3 * BINS) for value in row] for row in ((-0.3, 0.5), (0.3, 0.0), (0.1, 0.1))]
    expected = torch.zeros(3, BINS, dtype=torch.int64)
    for expert, (first, second) in enumerate(bins):
        expected[expert, first] += 1
        expected[expert, second] += 1
    assert torch.equal(routing.statistic, expected)
    # A third of 2 tokens is one token: the ends of the bins of -0.3, 0.0 and 0.1, of which one holds both tokens; then centred.
    router.after_step(routing.statistic)
    ends = [
        -1.2 + 2.3 / BINS * (bins[0][0] + 1),
        -1.2 + 2.3 / BINS * (bins[1][1] + 1),
        -1.2 + 2.3 / BINS * (bins[2][0] + 0.5),
    ]
    expect(router.bias, [end - sum(ends) / 3 for end in ends])
    assert router.eval()(scores.logit()).statistic is None, "evaluation observes"


@pytest.mark.parametrize("scores", ["sigmoid", "logits"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_biases_are_the_quantiles_of_the_step_within_a_bin(scores: Any, top_k: int) -> None:
    router = router_of(MoEConfig(8, top_k=top_k, router=QuantileRouterConfig(scores), **DROPLESS), 8)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(999, 8, generator=generator, dtype=torch.float64) + torch.linspace(-1, 1, 8)
    for _ in range(3):
        values = x if scores == "logits" else x.sigmoid()
        missing = (values + router.bias).sort(dim=1, descending=True).values[:, top_k : top_k + 1] - values  # [N, E]
        exact = missing.sort(dim=0).values[math.ceil(top_k / 8 * 999) - 1]  # [E]
        router.after_step(router(x).statistic)
        width = 4 / BINS if scores == "sigmoid" else 2 / BINS * (1 + exact.abs().max()).square() * 1.1
        assert (router.bias - (exact - exact.mean())).abs().max() < 2 * width
    load = router(x).tokens_per_expert.double()
    assert load.max() / load.mean() < 1.2, "a frozen batch balances in three steps"


def test_quantiles_of_two_shards_are_those_of_the_whole_and_padding_is_not_observed() -> None:
    router = router_of(MoEConfig(4, top_k=2, router=QuantileRouterConfig(), **DROPLESS), 4)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[32:] += torch.tensor([2.0, -1, 0, 0])  # shards that are unlike
    whole, halves = router(x).statistic, [router(half).statistic for half in x.split(32)]
    assert torch.equal(whole, halves[0] + halves[1])
    of_each = []
    for statistic in (*halves, whole):
        router.bias.zero_()
        router.after_step(statistic)
        of_each.append(router.bias.clone())
    assert ((of_each[0] + of_each[1]) / 2 - of_each[2]).abs().max() > 0.02, "their average would be the same"
    mask = (torch.arange(64) < 32).view(4, 16)
    assert torch.equal(router(x, RoutingContext(mask=mask)).statistic, router(x[:32]).statistic)
    router.after_step(torch.zeros_like(whole))  # a step without tokens
    assert torch.equal(router.bias, of_each[2])


# ---- hashed choice


def test_hashed_router_looks_up_different_experts_and_learns_their_weights() -> None:
    moe = MoEConfig(3, top_k=2, gate_scale=1.5, router=HashedRouterConfig(), **DROPLESS)
    router = router_of(moe, 3)
    router.table[7] = torch.tensor([2, 0])
    z = torch.tensor([[1.0, 5.0, -2.0]], dtype=torch.float64)
    routing = router(z, RoutingContext(torch.tensor([[7]])))
    assert routing.expert.tolist() == [[2, 0]]
    s = [math.sqrt(math.log1p(math.exp(value))) for value in (-2.0, 1.0)]
    expect(routing.weight, [[1.5 * value / sum(s) for value in s]])
    (gradient,) = torch.autograd.grad(routing.weight[0, 0], router.weight)
    assert gradient.any(), "the weights do not learn"
    alone = router_of(MoEConfig(3, router=HashedRouterConfig(scores="softmax"), **DROPLESS), 3)  # k = 1: not normalised
    alone.table[7] = 2
    expect(alone(z, RoutingContext(torch.tensor([[7]]))).weight, [[float(z.softmax(-1)[0, 2])]])


def test_tables_have_different_experts_in_a_row_and_equal_loads() -> None:
    counts = [1000 // (rank + 1) for rank in range(61)]
    table = torch.tensor(balanced_table(counts, 8, seed=1, top_k=3))
    assert (table.sort(dim=1).values.diff(dim=1) > 0).all()
    load = torch.zeros(8).index_add_(0, table.flatten(), torch.tensor(counts).repeat_interleave(3).float())
    assert load.max() / load.mean() < 1.2


def test_first_blocks_hash_and_later_ones_choose() -> None:
    moe = MoEConfig(4, top_k=2, expert_interval=2, router=HashedRouterConfig(hash_blocks=2), **DROPLESS)
    routers = [block.moe.router for block in GPT(GPTConfig(61, 16, 6, 16, 2, moe=moe)).blocks if block.moe is not None]
    assert [type(router) for router in routers] == [HashedRouter, HashedRouter, SigmoidRouter]
    assert routers[2].scores == "sqrtsoftplus"


def test_square_root_of_softplus_has_values_and_gradients_everywhere() -> None:
    z = torch.tensor([-300.0, -16.0, -14.0, 0.0, 3.0, 200.0], requires_grad=True)
    log_scores = SCORES["sqrtsoftplus"](z)
    exact = 0.5 * F.softplus(z.detach().double()).clamp_min(1e-300).log()
    expect(log_scores[1:], exact[1:].tolist(), 1e-5)
    expect(log_scores[0], -150.0)
    log_scores.sum().backward()
    expect(z.grad[:3], [0.5, 0.5, 0.5], 1e-3)
    assert z.grad.isfinite().all()


# ---- a weight of 1, and the smooth rule


def test_weight_is_1_and_its_gradient_that_of_the_probability_or_of_its_logarithm() -> None:
    z = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    p = z.softmax(-1)[0, 2]
    (of_p,) = torch.autograd.grad(p, z)
    for kind, factor in (("additive", 1.0), ("ratio", 1 / p.item())):
        router = router_of(MoEConfig(3, router=UnitWeightRouterConfig(kind), **DROPLESS), 3)
        routing = router(z)
        assert routing.weight.tolist() == [[1.0]]
        (gradient,) = torch.autograd.grad(routing.weight.sum(), z)
        torch.testing.assert_close(gradient, factor * of_p)
    with pytest.raises(ValueError, match="top_k=2 must be 1 with UnitWeightRouterConfig"):
        MoEConfig(4, top_k=2, router=UnitWeightRouterConfig())


def test_smooth_rule_moves_biases_by_the_centred_tanh_of_the_relative_error() -> None:
    settings = SigmoidRouterConfig(0.01, smooth=2.0, momentum=0.25)
    router = router_of(MoEConfig(3, top_k=2, router=settings, **DROPLESS), 3)
    router.after_step(torch.tensor([6, 3, 0]))  # the mean is 3: errors -1, 0, 1
    change = [math.tanh(-2.0), 0.0, math.tanh(2.0)]
    expect(router.bias, [0.01 * 0.75 * value for value in change])
    router.after_step(torch.tensor([0, 6, 3]))
    again = [
        0.25 * 0.75 * first + 0.75 * second for first, second in zip(change, (change[2], change[0], 0.0), strict=True)
    ]
    expect(router.bias, [0.01 * (0.75 * first + second) for first, second in zip(change, again, strict=True)])
    before = router.momentum.clone()
    router.after_step(torch.zeros(3, dtype=torch.int64))
    assert torch.equal(router.momentum, 0.25 * before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoEConfig([2, 4], top_k=2, router=QuantileRouterConfig()), "top_k=2 must be below num_experts=2"),
        (lambda: HashedRouterConfig(hash_blocks=0), "hash_blocks=0 must be at least 1, or null"),
        (lambda: SigmoidRouterConfig(smooth=-1.0), "smooth=-1.0 must be above 0, or null"),
        (lambda: SigmoidRouterConfig(momentum=1.0), "momentum=1.0 must be at least 0 and below 1"),
        (lambda: replace(SigmoidRouterConfig(), scores="tanh"), "scores"),
    ],
)
def test_wrong_settings_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
