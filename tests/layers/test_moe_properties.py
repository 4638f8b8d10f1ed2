"""What holds for every batch and setting: of the MoE layer, its dispatch, the grouped GEMM and the chunked loss."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.dispatch import LocalDispatch, LocalDispatcher
from nlgmoe.layers.losses import cross_entropy, token_losses
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.router import capacity
from nlgmoe.layers.routing import Routing, RoutingContext

WIDTH, INNER = 6, 10
properties = settings(max_examples=50)
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SHARES = st.sampled_from([None, 0.0, 0.6])  # of tokens whose loss counts; None: all, without a mask


@dataclass
class Case:
    layer: MoELayer
    config: MoEConfig
    x: Tensor  # [B, T, H]
    mask: Tensor  # [B, T]
    generator: torch.Generator


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


@st.composite
def cases(draw: st.DrawFn, **fixed: object) -> Case:
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(experts, 4)))
    divisors = [number for number in range(1, experts + 1) if experts % number == 0]
    groups = [[n, g] for n in divisors for g in range(1, n + 1) if top_k <= g * experts // n]
    mlp_type = draw(st.sampled_from(["standard", "residual"]))
    moe = MoEConfig(
        num_experts=experts,
        expert_interval=1,
        top_k=top_k,
        groups=draw(st.sampled_from([None, *groups])),
        mlp_type=mlp_type,
        residual_mix=draw(st.sampled_from(["learned", "sum", "sigmoid"] if mlp_type == "residual" else ["learned"])),
        train_capacity_factor=draw(st.sampled_from([0.3, 1.0, 1.1, 2.0])),
        min_capacity=draw(st.integers(0, 4)),
        token_dropping=draw(st.booleans()),
        random_token_selection=draw(st.booleans()),
        noise=draw(st.sampled_from([None, "jitter"])),
        second_expert=draw(st.sampled_from(["sample", "argmax"])),
    )
    moe = replace(moe, **fixed)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    layer = MoELayer(GPTConfig(8, 8, 1, WIDTH, 1, INNER, moe=moe), block=0).double()
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    x = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    return Case(layer, moe, x, mask, generator)


@properties
@given(cases())
def test_assignments_are_neither_lost_nor_duplicated_and_respect_the_capacity(case: Case) -> None:
    _, routing = case.layer(case.x, RoutingContext(mask=case.mask))
    experts, top_k = case.layer.router.num_experts, case.config.top_k
    assert all(len(set(row)) == top_k for row in routing.expert.tolist()), "a token chose an expert twice"
    assert not routing.kept[~case.mask.flatten()].any(), "padding took capacity"
    assert not routing.weight[~routing.kept].any()
    number, chosen = case.config.groups or (1, 1)
    assert all(len({e * number // experts for e in row}) <= chosen for row in routing.expert.tolist()), "other groups"

    dispatch = LocalDispatch(case.x.flatten(0, 1), routing)
    tokens_per_expert = dispatch.tokens_per_expert
    served = dispatch.order[: int(tokens_per_expert.sum())]
    assert dispatch.receive().tokens_per_expert.sum() == len(dispatch.order)
    assert len(dispatch.order) == max(len(served), 1), "dropped rows are computed on a CPU"
    assert sorted(served.tolist()) == routing.kept.flatten().nonzero().flatten().tolist()
    owner = torch.arange(experts).repeat_interleave(tokens_per_expert)
    assert torch.equal(routing.expert.flatten()[served], owner), "a row is in another expert's block"

    wanted = routing.tokens_per_expert
    assert wanted.sum() == case.mask.sum() * top_k
    limit = capacity(case.mask.numel(), experts, top_k, case.config.train_capacity_factor, case.config.min_capacity)
    expected = wanted.clamp_max(limit) if case.config.token_dropping else wanted  # full, but never overfull
    assert torch.equal(tokens_per_expert, expected)


def one_token_at_a_time(case: Case, x: Tensor, kept: Tensor, expert: Tensor, probs: Tensor) -> Tensor:
    """The layer's formula, spelled out; only the decisions (`kept`, `expert`) are the router's."""
    layer, rows = case.layer, []
    e = layer.experts
    for n, token in enumerate(x.flatten(0, 1)):
        y = 0 * token
        chosen = [i for i in range(case.config.top_k) if kept[n, i]]
        total = sum(probs[n, expert[n, i]] for i in chosen) if case.config.top_k > 1 else 1.0
        for i in chosen:
            j = expert[n, i]
            inner = F.gelu(token @ e.up_weight[j] + e.up_bias[j], approximate="tanh")
            y = y + probs[n, j] / total * (inner @ e.down_weight[j] + e.down_bias[j])
        if layer.shared_expert is not None:
            c = torch.ones(2)
            if case.config.residual_mix == "learned":
                c = layer.coefficient(token).softmax(-1)
            elif case.config.residual_mix == "sigmoid":
                c = torch.stack([c[0].double(), 1 / (1 + torch.exp(-layer.coefficient.weight[0] @ token))])
            y = c[0] * y + c[1] * layer.shared_expert(token)
        rows.append(y)
    return torch.stack(rows).view_as(x)


@properties
@given(cases(noise=None))
def test_output_and_gradients_equal_a_loop_over_tokens(case: Case) -> None:
    leaves = [case.x.requires_grad_(), *case.layer.parameters()]
    y, routing = case.layer(case.x, RoutingContext(mask=case.mask))
    probs = (case.x.flatten(0, 1) @ case.layer.router.weight.t()).softmax(-1)
    expected = one_token_at_a_time(case, case.x, routing.kept, routing.expert, probs)
    torch.testing.assert_close(y, expected, **EXACT)
    assert {value.dtype for value in (routing.weight, routing.probs, *router_losses([routing]))} == {torch.float64}

    probe = torch.randn(y.shape, generator=case.generator, dtype=y.dtype)
    ours_and_theirs = (gradients((output * probe).sum(), *leaves) for output in (y, expected))
    for ours, reference in zip(*ours_and_theirs, strict=True):
        torch.testing.assert_close(ours, reference, **EXACT)


class SlotDispatcher(LocalDispatcher):
    """That of accelerators, with slots at any capacity."""

    def forward(self, tokens: Tensor, routing: Routing) -> LocalDispatch:
        return LocalDispatch(tokens, routing, routing.capacity)


@properties
@given(cases(token_dropping=True))
def test_slots_compute_what_counted_rows_do(case: Case) -> None:
    results, context = [], RoutingContext(mask=case.mask, noise_key=(0, 1, 2))
    probe = torch.randn(case.x.shape, generator=case.generator, dtype=case.x.dtype)
    for dispatcher in (SlotDispatcher(), LocalDispatcher()):
        case.layer.dispatcher = dispatcher
        y, _ = case.layer(case.x.requires_grad_(), context)
        results.append([y, *gradients((y * probe).sum(), case.x, *case.layer.parameters())])
    for slots, rows in zip(*results, strict=True):
        torch.testing.assert_close(slots, rows, **EXACT)


@properties
@given(case=cases(), garbage=st.sampled_from([-7.0, 1e30]))
def test_padding_values_change_no_real_token_no_loss_and_no_gradient(case: Case, garbage: float) -> None:
    def everything(x: Tensor) -> list[Tensor]:
        y, routing = case.layer(x, RoutingContext(mask=case.mask, noise_key=(0, 1, 2)))
        real, losses = y[case.mask], router_losses([routing])
        seen = [real, routing.weight[case.mask.flatten()], *losses, routing.tokens_per_expert]
        return seen + gradients(real.sum() + sum(losses), *case.layer.parameters())

    padded = torch.where(case.mask[..., None], case.x, garbage)
    for got, expected in zip(everything(padded), everything(case.x), strict=True):
        torch.testing.assert_close(got, expected, **EXACT)


@properties
@given(*(st.integers(*bounds) for bounds in ((1, 12), (1, 9), (0, 3), (1, 14))), SHARES, st.integers(0, 2**32))
def test_chunked_cross_entropy_equals_the_plain_formula_for_any_chunk_size_mask_and_padding(
    num_tokens: int, vocab: int, padding: int, chunk_size: int, density: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, 5, generator=generator, dtype=torch.float64).requires_grad_()
    table = torch.randn(vocab + padding, 5, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(vocab, (num_tokens,), generator=generator)
    mask = None if density is None else torch.rand(num_tokens, generator=generator) < density
    counted = range(num_tokens) if mask is None else mask.nonzero().flatten().tolist()

    per_token = -(hidden @ table[:vocab].t()).log_softmax(-1)[torch.arange(num_tokens), targets]
    expected = sum((per_token[n] for n in counted), torch.zeros(())) / max(len(counted), 1)
    loss = cross_entropy(hidden, table, vocab, targets, mask, chunk_size)
    torch.testing.assert_close(loss, expected.double(), **EXACT)
    assert loss != 0 or not counted or vocab == 1
    torch.testing.assert_close(token_losses(hidden, table, vocab, targets, chunk_size), per_token.detach(), **EXACT)
    if counted:
        expected = torch.autograd.grad(3 * expected, (hidden, table))
        for ours, reference in zip(torch.autograd.grad(3 * loss, (hidden, table)), expected, strict=True):
            torch.testing.assert_close(ours, reference, **EXACT)
    else:
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (hidden, table)))


def test_rows_of_an_expert_are_in_token_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a sort that turns ties round where it may."""
    sort = torch.sort

    def turning(values: Tensor, stable: bool = False) -> object:
        found = sort(values.flip(0), stable=True)
        return sort(values, stable=True) if stable else type(found)((found.values, len(values) - 1 - found.indices))

    monkeypatch.setattr(torch, "sort", turning)
    layer, x = MoELayer(GPTConfig(8, 16, 1, 4, 1, moe=MoEConfig(2, 1)), 0), torch.randn(1, 16, 4)
    nn.init.normal_(layer.router.weight)
    dispatch = LocalDispatch(x[0], layer.router(x[0]))
    for rows in dispatch.order.split(dispatch.receive().tokens_per_expert.tolist()):
        assert torch.equal(rows, rows.sort().values)
