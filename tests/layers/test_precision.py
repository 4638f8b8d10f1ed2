"""What stays in fp32 when the rest does not: the router, its losses, the weighted sum, the residual mix, the loss."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.losses import SoftTargets, TopTargets, cross_entropy, distilled_cross_entropy
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.precision import allows_tf32, fp32_products

MOE = MoEConfig(4, 1, top_k=2, mlp_type="residual", second_expert="argmax", token_dropping=False)


def layer(dtype: torch.dtype, mix: str = "learned") -> MoELayer:
    moe = MoELayer(GPTConfig(8, 64, 1, 16, 2, 32, moe=replace(MOE, residual_mix=mix)), block=0)
    torch.manual_seed(1)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return moe.to(dtype)


def batch(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).to(dtype)


@contextmanager
def precision(name: str) -> Iterator[tuple[MoELayer, Tensor]]:
    """A layer and its input in one of the three ways to train; all of their values are bf16 numbers."""
    dtype = torch.float32 if name == "bf16-mixed" else {"fp64": torch.float64, "bf16-true": torch.bfloat16}[name]
    with torch.autocast("cpu", torch.bfloat16) if name == "bf16-mixed" else nullcontext():
        yield layer(torch.bfloat16).to(dtype), batch(dtype)


class Calls(TorchFunctionMode):
    """Types that softmax is computed in, and the precision of the products of each weight."""

    def __init__(self) -> None:
        super().__init__()
        self.softmaxes: list[torch.dtype] = []
        self.products: dict[int, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.softmax:
            self.softmaxes.append(args[0].dtype)
        if func is F.linear:
            self.products[id(args[1])] = torch.get_float32_matmul_precision()
        return func(*args, **(kwargs or {}))


def test_router_is_in_fp32_where_a_script_sets_one_backend() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # PyTorch's older setting cannot be read then
    try:
        with fp32_products():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee" and not allows_tf32()
        assert allows_tf32()
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["bf16-mixed", "bf16-true"])
def test_half_precision_routes_as_fp32_bit_for_bit_and_its_gradients_are_close(name: str) -> None:
    with precision(name) as (moe, x), Calls() as calls:
        y, routing = moe(x)
    assert y.dtype == x.dtype and calls.softmaxes == [torch.float32] * 2  # the router's, the coefficient's
    exact = layer(torch.bfloat16).float()
    expected_y, expected = exact(x.float())
    for part in ("weight", "probs", "logits"):
        assert getattr(routing, part).dtype == torch.float32
    for part, value in vars(expected).items():
        found = getattr(routing, part)
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, part

    for output, its_routing in ((y, routing), (expected_y, expected)):
        (output.float().square().mean() + sum(router_losses([its_routing]))).backward()
    for (part, ours), reference in zip(moe.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == ours.dtype
        error = (ours.grad.float() - reference.grad).norm() / reference.grad.norm()
        assert error < 0.02, f"{part}: {error:.3f}"


@pytest.mark.parametrize("mix", ["learned", "sigmoid"])
@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_router_and_mix_are_in_fp32_where_a_script_allows_less(allowed: str, mix: str) -> None:
    """On a GPU Lightning advises `high` or `medium`: TF32."""
    moe = layer(torch.float32, mix)
    torch.set_float32_matmul_precision(allowed)
    try:
        with Calls() as calls:
            moe(batch(torch.float32))
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [calls.products[id(part.weight)] for part in (moe.router, moe.coefficient)] == ["highest"] * 2
    assert after == calls.products[id(moe.shared_expert.up.weight)] == allowed  # all other products: as the script says


@pytest.mark.parametrize("name", ["bf16-mixed", "bf16-true"])
def test_cross_entropy_rounds_the_logits_once_and_sums_loss_and_gradient_in_fp32(name: str) -> None:
    torch.manual_seed(0)
    hidden, table = torch.randn(2000, 16).to(torch.bfloat16), torch.randn(50, 16).to(torch.bfloat16)
    targets = torch.randint(50, (2000,))
    given = [t.to(torch.bfloat16 if name == "bf16-true" else torch.float32).requires_grad_() for t in (hidden, table)]
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16-mixed"):
        loss = cross_entropy(*given, 50, targets, None, chunk_size=8)
    expected = F.cross_entropy((hidden @ table.t()).float(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)

    exact = [t.detach().float().requires_grad_() for t in (hidden, table)]
    F.cross_entropy(exact[0] @ exact[1].t(), targets).backward()
    for leaf, reference, gradient in zip(given, exact, torch.autograd.grad(loss, given), strict=True):
        assert gradient.dtype == leaf.dtype
        error = (gradient.float() - reference.grad).norm() / reference.grad.norm()
        assert error < 0.005, f"{error:.4f}"  # 250 sums in bf16 would lose much more


TOKENS, VOCABULARY, ROWS, WIDTH = 512, 2001, 2048, 32
DIVISOR = 8192 * 50257 / VOCABULARY  # a probability divided by it is as small as in 8,192 tokens of 50,257 classes


def head(dtype: torch.dtype, kind: str, autocast: bool, scale: float) -> list[Tensor]:
    """Gradients of the hidden states, the norm's bias and the table, after a loss scale; in fp64 from the plain formula."""
    draw = torch.Generator().manual_seed(0)
    normed, table = (torch.randn(n, WIDTH, generator=draw).bfloat16().float() for n in (TOKENS, ROWS))
    targets = torch.randint(50, (TOKENS,), generator=draw)  # most of the vocabulary is not in the batch
    mask = torch.rand(TOKENS, generator=draw) < 0.9
    teacher = torch.randn(TOKENS, VOCABULARY, generator=draw)
    low = torch.float32 if autocast else dtype
    bias, table = torch.zeros(WIDTH, dtype=low).requires_grad_(), (0.05 * table).bfloat16().to(low).requires_grad_()
    hidden = normed.to(low) + bias
    hidden.retain_grad()
    ids = teacher.topk(8).indices
    tail = teacher.log_softmax(-1).exp().scatter(1, ids, 0).sum(-1, keepdim=True).log()
    top = torch.cat([teacher.log_softmax(-1).gather(1, ids), tail], dim=1)
    if dtype == torch.float64:
        logits = hidden @ table[:VOCABULARY].t()
        loss = F.cross_entropy(logits[mask], targets[mask], reduction="sum")
        if kind == "distilled":
            loss = loss + 4 * _divergence(teacher.double() / 2, logits / 2)[mask].sum()
        elif kind == "recorded":
            p = logits.softmax(-1)
            ours = torch.cat([p.gather(1, ids), p.scatter(1, ids, 0).sum(-1, keepdim=True)], dim=1).log()
            loss = loss + _divergence(top.double(), ours)[mask].sum()
        loss = loss / DIVISOR
    else:
        arguments = hidden, table, VOCABULARY, targets, mask, 100, torch.tensor(DIVISOR)
        with torch.autocast("cpu", dtype, enabled=autocast):
            if kind == "plain":
                loss = cross_entropy(*arguments)
            else:
                whole = SoftTargets(lambda part: teacher[part], 1.0, 2.0)
                said = whole if kind == "distilled" else TopTargets(lambda part: (ids[part], top[part]), 1.0, 1.0)
                loss = distilled_cross_entropy(*arguments, said).loss
    (loss * scale).backward()
    assert not table.grad[VOCABULARY:].any()
    return [gradient.double() / scale for gradient in (hidden.grad[mask], bias.grad, table.grad[:VOCABULARY])]


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("kind", ["plain", "distilled", "recorded"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_head_gradient_loses_no_row_under_a_loss_scale(dtype: torch.dtype, limit: float, kind: str) -> None:
    exact = head(torch.float64, kind, False, 1.0)
    for autocast in (True, False):
        for scale in (2.0**11, 2.0**16):
            found = head(dtype, kind, autocast, scale)
            for name, ours, expected in zip(("hidden", "bias", "table"), found, exact, strict=True):
                assert (ours - expected).norm() / expected.norm() < limit, (name, autocast, scale)
                worst = ((ours - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
                assert worst < 0.1, (name, autocast, scale, worst)


def test_layer_in_fp64_computes_in_fp64() -> None:
    """Nothing on the way is fp32 either: in test_moe_properties.py the layer equals a loop to 1e-10."""
    with precision("fp64") as (moe, x):
        y, routing = moe(x)
    assert {value.dtype for value in (y, routing.weight, routing.probs, *router_losses([routing]))} == {torch.float64}
