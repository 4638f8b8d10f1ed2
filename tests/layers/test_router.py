"""Routings worked out by hand, and what the randomness and the losses of the router depend on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nlgmoe.config import MoEConfig
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.router import TopKRouter
from nlgmoe.layers.routing import Routing, RoutingContext

PLAIN = MoEConfig(min_capacity=0, random_token_selection=False, second_expert="argmax")


def route(config: MoEConfig, probs: list[list[float]], mask: Any = None, training: bool = True) -> Routing:
    """Route tokens with gate probabilities `probs`: the router is the identity, and its input is their logarithm."""
    table = torch.tensor(probs, dtype=torch.float64)
    router = TopKRouter(config, table.shape[1], table.shape[1], block=0).double().train(training)
    torch.nn.init.eye_(router.weight)
    return router(table.log(), RoutingContext(mask=None if mask is None else torch.tensor(mask)))


def balance_loss(routing: Routing) -> Tensor:
    return router_losses([routing])[0]


def expect(actual: Tensor, expected: list | float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=1e-12)


FOUR_TOKENS = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]]  # three want expert 0, one wants expert 1


def test_top_1_keeps_the_earliest_tokens_and_weighs_by_probability() -> None:
    routing = route(PLAIN, FOUR_TOKENS)  # a capacity of 2
    assert routing.expert.tolist() == [[0], [0], [0], [1]]
    assert routing.kept.tolist() == [[True], [True], [False], [True]]
    expect(routing.weight, [[0.9], [0.8], [0.0], [0.6]])
    assert routing.tokens_per_expert.tolist() == [3, 1]  # before dropping
    assert routing.num_tokens == 4
    expect(balance_loss(routing), 2 * (0.7 * 3 / 4 + 0.3 * 1 / 4))


def test_top_2_serves_all_first_choices_before_any_second_and_renormalises_over_the_kept() -> None:
    probs = [[0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]
    routing = route(replace(PLAIN, top_k=2), probs)  # 2 * 3 / 3 = 2 assignments each
    assert routing.expert.tolist() == [[1, 2], [0, 1], [0, 1]]
    # Expert 1: token 0 by first choice, token 1 by second, and then it is full.
    assert routing.kept.tolist() == [[True, True], [True, True], [True, False]]
    expect(routing.weight, [[0.6 / 0.9, 0.3 / 0.9], [0.5 / 0.8, 0.3 / 0.8], [1.0, 0.0]])
    assert routing.tokens_per_expert.tolist() == [2, 3, 1]
    expect(balance_loss(routing), 3 * (0.4 * 2 / 3 + 0.4 * 1 / 3 + 0.2 * 0))  # first choices only
    expect(balance_loss(route(replace(PLAIN, top_k=2), probs[:1])), 3 * 0.6)

    late_first = [[0.53, 0.45, 0.02], [0.3, 0.2, 0.5], [0.3, 0.36, 0.34]]
    kept = route(replace(PLAIN, top_k=2, train_capacity_factor=0.5), late_first).kept  # one assignment each
    # Expert 1 is token 2's first choice, so token 0's second loses, although its gate is higher; the others' seconds lose too.
    assert kept.tolist() == [[True, False], [True, False], [True, False]]


def test_masked_tokens_take_no_capacity_and_count_in_no_statistic() -> None:
    routing = route(replace(PLAIN, random_token_selection=True), FOUR_TOKENS, mask=[False, True, True, True])
    assert routing.kept.tolist() == [[False], [True], [True], [True]]  # with the first token gone, expert 0 has room
    expect(routing.weight, [[0.0], [0.8], [0.7], [0.6]])
    assert routing.tokens_per_expert.tolist() == [2, 1]
    assert routing.num_tokens == 3
    expect(balance_loss(routing), 2 * ((0.8 + 0.7 + 0.4) / 3 * 2 / 3 + (0.2 + 0.3 + 0.6) / 3 * 1 / 3))
    nothing = route(PLAIN, FOUR_TOKENS, mask=[False] * 4)
    assert not nothing.kept.any() and router_losses([nothing]) == (0, 0)


SIX = [0.05, 0.30, 0.20, 0.22, 0.23, 1e-9]  # three groups of two: their maxima are 0.30, 0.22, 0.23


@pytest.mark.parametrize(
    ("top_k", "groups", "expert"),
    [(1, [3, 1], [1]), (2, [3, 1], [1, 0]), (2, [3, 2], [1, 4]), (4, [3, 2], [1, 4, 0, 5]), (3, [2, 1], [1, 2, 0])],
)
def test_a_token_chooses_within_its_best_groups(top_k: int, groups: list[int], expert: list[int]) -> None:
    config = replace(PLAIN, num_experts=6, top_k=top_k, groups=groups, token_dropping=False)
    routing = route(config, [SIX], training=False)
    assert routing.expert[0].tolist() == expert
    weight = torch.tensor(SIX, dtype=torch.float64)[expert]
    expect(routing.weight[0], (weight / (weight.sum() if top_k > 1 else sum(SIX))).tolist())


@pytest.mark.parametrize(
    "config",
    [
        MoEConfig(4, min_capacity=0),  # random token selection
        MoEConfig(4, token_dropping=False, noise="jitter"),
        MoEConfig(4, token_dropping=False, noise="rsample"),
        MoEConfig(4, token_dropping=False, top_k=2),  # samples the second expert
    ],
    ids=["random_token_selection", "jitter", "rsample", "second_expert"],
)
def test_noise_depends_on_the_key_and_the_layer_alone_and_evaluation_has_none(config: MoEConfig) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)) * 0.3

    def weights(key: tuple[int, ...] | None, layer: int = 0, training: bool = True) -> list[list[float]]:
        router = TopKRouter(config, 8, 4, layer).train(training)
        router.weight.data = weight
        routing = router(x, RoutingContext(noise_key=key))
        assert training or routing.kept.all(), "evaluation drops"
        order = routing.expert.argsort(1)  # expert numbers and weights
        return torch.cat([routing.expert.gather(1, order), routing.weight.gather(1, order)], dim=1).tolist()

    reference = weights((0, 5, 2))
    before = torch.get_rng_state()
    assert weights((0, 5, 2)) == reference
    assert torch.equal(torch.get_rng_state(), before), "a keyed draw moved the global generator"
    others = [weights((1, 5, 2)), weights((0, 6, 2)), weights((0, 5, 3)), weights((0, 5, 2), layer=1), weights(None)]
    assert all(other != reference and others.count(other) == 1 for other in others)
    quiet = [weights(key, training=False) for key in ((0, 5, 2), (9, 9, 9), None)]
    assert quiet[0] == quiet[1] == quiet[2] != reference


def test_random_choices_follow_their_distributions() -> None:
    many, probs = 20_000, [0.5, 0.3, 0.15, 0.05]
    torch.manual_seed(0)
    roomy = MoEConfig(4, token_dropping=False)
    by_rsample = route(replace(roomy, noise="rsample"), [probs] * many).expert[:, 0]
    torch.testing.assert_close(by_rsample.bincount(minlength=4) / many, torch.tensor(probs), rtol=0, atol=0.015)
    first, second = route(replace(roomy, top_k=2), [probs] * many).expert.unbind(1)
    assert not first.any()  # the first choice stays the argmax; the second is drawn from the rest
    expected = torch.tensor([0.0, 0.6, 0.3, 0.1])
    torch.testing.assert_close(second.bincount(minlength=4) / many, expected, rtol=0, atol=0.015)

    crowd = [[0.9, 0.1]] * 8  # a capacity of 4: each token stays in half of the draws
    kept = torch.stack([route(MoEConfig(2, min_capacity=0), crowd).kept[:, 0] for _ in range(400)]).double()
    torch.testing.assert_close(kept.mean(0), torch.full((8,), 0.5, dtype=torch.float64), rtol=0, atol=0.12)


def test_router_in_evaluation_drops_only_on_request() -> None:
    config = replace(PLAIN, train_capacity_factor=4.0, eval_capacity_factor=1.0)
    assert route(config, FOUR_TOKENS).kept.all() and route(config, FOUR_TOKENS, training=False).kept.all()
    asked = replace(config, eval_token_dropping=True, random_token_selection=True)
    assert route(asked, FOUR_TOKENS, training=False).kept.tolist() == [[True], [True], [False], [True]]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_is_1_when_balanced_and_the_number_of_experts_when_collapsed(top_k: int) -> None:
    config = replace(PLAIN, top_k=top_k)
    balanced = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.3, 0.2], [0.2, 0.1, 0.4, 0.3], [0.3, 0.2, 0.1, 0.4]]
    expect(balance_loss(route(config, balanced)), 1.0)
    collapsed = [[1 - 3e-14, 1e-14, 1e-14, 1e-14]] * 4
    expected = 4.0 if top_k < 3 else 4.0 / 3  # k=3: two thirds of the load go elsewhere
    expect(balance_loss(route(config, collapsed)), expected)


def test_z_loss_is_the_mean_squared_logsumexp_of_unmasked_logits() -> None:
    router = TopKRouter(PLAIN, 2, 2, 0).double()
    torch.nn.init.eye_(router.weight)
    logits = torch.tensor([[1.0, 1.0], [3.0, 3.0], [50.0, 0.0]], dtype=torch.float64)
    _, z_loss = router_losses([router(logits, RoutingContext(mask=torch.tensor([True, True, False])))])
    expect(z_loss, (1.6931471805599453**2 + 3.6931471805599453**2) / 2)  # logsumexp(a, a) = a + log 2
