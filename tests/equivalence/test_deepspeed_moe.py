"""`MoELayer` against DeepSpeed's `MoE`, same weights, same random numbers: same outputs, losses and gradients."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers import router as our_router
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.moe import MoELayer

BATCH, SEQ, WIDTH, INNER, EXPERTS = 2, 50, 16, 40, 5
TOKENS = BATCH * SEQ
CPU = torch.device("cpu")
NOISE = {"jitter": "Jitter", "rsample": "RSample", None: None}


@pytest.fixture(autouse=True)
def same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed both sides one set of draws: a priority per token, a factor per gate input, Gumbel noise per logit."""
    generator = torch.Generator().manual_seed(7)
    uniform = {shape: torch.rand(shape, generator=generator) for shape in ((TOKENS,), (TOKENS, WIDTH))}
    noise = -torch.log(-torch.log(torch.rand(TOKENS, EXPERTS, generator=generator)))

    class OurDraws:
        def __init__(self, *_: object) -> None: ...

        def __call__(self, shape: tuple[int, ...]) -> Tensor:
            return uniform[tuple(shape)]

        def gumbel(self, shape: torch.Size) -> Tensor:
            assert tuple(shape) == noise.shape
            return noise

    monkeypatch.setattr(our_router, "RoutingNoise", OurDraws)
    priorities, jitter = uniform[(TOKENS,)], uniform[(TOKENS, WIDTH)]
    monkeypatch.setitem(sharded_moe.exp_selection_uniform_map, CPU, lambda shape: priorities[:, None].expand(shape))
    monkeypatch.setitem(sharded_moe.uniform_map, CPU, lambda shape: 1 - 1e-2 + 2e-2 * jitter)
    monkeypatch.setitem(sharded_moe.gumbel_map, CPU, lambda shape: noise)


@dataclass
class Pair:
    ours: MoELayer
    theirs: MoE

    def parameters(self) -> Iterator[tuple[str, Tensor, Any, Tensor]]:
        """Name, our parameter, the part of it that is one of theirs, and theirs."""
        ours, gate = self.ours, self.theirs.deepspeed_moe.gate
        yield "router", ours.router.weight, ..., gate.wg.weight
        parts = {"0": "up", "2": "down"}
        for expert, body in enumerate(self.theirs.deepspeed_moe.experts.deepspeed_experts):
            for leaf, theirs in body.named_parameters():
                name = f"{parts[leaf[0]]}_{leaf[2:]}"
                yield f"expert {expert} {name}", ours.experts.get_parameter(name), expert, theirs
        if ours.shared_expert is not None:
            for leaf, theirs in self.theirs.mlp.named_parameters():
                yield f"mlp {leaf}", ours.shared_expert.get_parameter(parts[leaf[0]] + leaf[1:]), ..., theirs
            for leaf, theirs in self.theirs.coefficient.named_parameters():
                yield f"coefficient {leaf}", ours.coefficient.get_parameter(leaf), ..., theirs


def pair(moe: MoEConfig, training: bool = True) -> Pair:
    """Both layers with the same weights; the router prefers the later experts, so that capacity runs out."""
    ours = MoELayer(GPTConfig(64, 64, 1, WIDTH, 4, INNER, moe=moe), block=0)
    body = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(approximate="tanh"), nn.Linear(INNER, WIDTH))
    dropping = moe.token_dropping if training else moe.eval_token_dropping
    theirs = MoE(
        WIDTH, body, EXPERTS, k=moe.top_k, capacity_factor=moe.train_capacity_factor,
        eval_capacity_factor=moe.eval_capacity_factor, min_capacity=moe.min_capacity,
        use_residual=moe.mlp_type == "residual", noisy_gate_policy=NOISE[moe.noise], drop_tokens=dropping,
        use_rts=moe.random_token_selection, top2_2nd_expert_sampling=moe.second_expert == "sample",
    )  # fmt: skip
    torch.manual_seed(3)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.deepspeed_moe.gate.wg.weight.data += torch.linspace(-0.1, 0.1, EXPERTS)[:, None]
    both = Pair(ours.train(training), theirs.train(training))
    with torch.no_grad():
        for _, mine, part, other in both.parameters():
            mine[part] = as_ours(mine[part], other)
    return both


def as_ours(mine: Tensor, other: Tensor) -> Tensor:
    return other.t() if mine.shape != other.shape else other


def run(both: Pair, aux_coeff: float = 0.7, token_mask: Tensor | None = None) -> our_router.Routing:
    """Forward and backward on both sides; everything they say must agree to 1e-5."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(BATCH, SEQ, WIDTH, generator=generator) + 0.5
    probe = torch.randn(x.shape, generator=generator) if token_mask is None else token_mask[..., None].float()
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, routing = both.ours(x_ours, our_router.RoutingContext(mask=token_mask))
    expected, aux_loss, counts = both.theirs(x_theirs, None if token_mask is None else token_mask.flatten().long())
    close("output", y, expected)
    assert torch.equal(routing.tokens_per_expert, counts)
    balance, _ = router_losses([routing])
    if token_mask is None:  # with one, DeepSpeed lets padding into the mean probability, and nlgmoe does not
        close("aux loss", balance, aux_loss)

    ((y * probe).sum() + aux_coeff * balance).backward()
    ((expected * probe).sum() + aux_coeff * aux_loss).backward()
    close("input gradient", x_ours.grad, x_theirs.grad)
    for name, mine, part, other in both.parameters():
        gradient = torch.zeros_like(other) if other.grad is None else other.grad
        close(f"gradient of {name}", mine.grad[part], as_ours(mine[part], gradient))
    return routing


def close(what: str, ours: Tensor, theirs: Tensor) -> None:
    error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-3)
    assert error <= 1e-5, f"{what}: relative error {error:.1e}"


@pytest.mark.parametrize("factor", [1.0, 1.2, 2.0])
@pytest.mark.parametrize("dropping", [True, False], ids=["dropping", "dropless"])
@pytest.mark.parametrize("mlp_type", ["standard", "residual"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_output_losses_counts_and_gradients_are_deepspeeds(
    top_k: int, mlp_type: str, dropping: bool, factor: float
) -> None:
    moe = MoEConfig(
        EXPERTS, 1, top_k, mlp_type, train_capacity_factor=factor, token_dropping=dropping, second_expert="argmax"
    )
    routing = run(pair(moe))
    overflow = routing.tokens_per_expert.max().item() > our_router.capacity(TOKENS, EXPERTS, top_k, factor, 4)
    assert bool((~routing.kept).any()) == (dropping and overflow)
    if factor <= 1.2:
        assert overflow, "nothing to drop: the test would prove little"


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(EXPERTS, 1, 1, noise="jitter"),
        MoEConfig(EXPERTS, 1, 3, "residual", noise="jitter"),
        MoEConfig(EXPERTS, 1, 1, "residual", noise="rsample", token_dropping=False),
        MoEConfig(EXPERTS, 1, 1, noise="rsample"),
        MoEConfig(EXPERTS, 1, 2, second_expert="sample"),
    ],
    ids=lambda moe: f"k{moe.top_k}-{moe.noise}-{moe.second_expert}-{moe.mlp_type}",
)
def test_noise_that_is_the_same_gives_deepspeeds_result(moe: MoEConfig) -> None:
    noisy = run(pair(moe))
    quiet = MoEConfig(EXPERTS, 1, moe.top_k, second_expert="argmax", token_dropping=moe.token_dropping)
    assert not torch.equal(noisy.weight, run(pair(quiet)).weight), "the noise did nothing"


def test_top_2_in_evaluation_drops_as_deepspeed_does() -> None:
    # Evaluation draws nothing here; DeepSpeed would still sample the second expert.
    moe = MoEConfig(EXPERTS, 1, 2, eval_capacity_factor=1.1, eval_token_dropping=True, second_expert="argmax")
    assert not run(pair(moe, training=False)).kept.all()


def test_padding_takes_no_slot_as_with_deepspeeds_used_token() -> None:
    token_mask = torch.rand(BATCH, SEQ, generator=torch.Generator().manual_seed(1)) < 0.8
    routing = run(pair(MoEConfig(EXPERTS, 1)), aux_coeff=0.0, token_mask=token_mask)
    assert not routing.kept[~token_mask.flatten()].any()
    assert not routing.kept[token_mask.flatten()].all(), "no real token is over capacity"


@given(
    num_tokens=st.integers(1, 100_000),
    num_experts=st.integers(1, 512),
    top_k=st.integers(1, 4),
    factor=st.sampled_from([1.0, 1.1, 1.2, 1.25, 1.3, 2.0]) | st.floats(0.1, 8),
    minimum=st.integers(0, 8),
)
def test_capacity_is_deepspeeds(num_tokens: int, num_experts: int, top_k: int, factor: float, minimum: int) -> None:
    gates = torch.empty(1, 1).expand(num_tokens, num_experts)
    expected = sharded_moe._capacity(gates, torch.tensor(factor * top_k), torch.tensor(minimum))
    assert our_router.capacity(num_tokens, num_experts, top_k, factor, minimum) == expected
