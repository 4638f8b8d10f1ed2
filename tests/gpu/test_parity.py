"""Layers, losses and the whole model on a GPU against the same code on the CPU in fp32.

A GPU draws other random numbers than a CPU: the routing's are drawn on the CPU here. Memory is full of NaN beforehand
(conftest.py).
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers import router as router_module
from nlgmoe.layers.attention import AttentionContext, CausalSelfAttention, KVCache
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.model.gpt import GPT
from nlgmoe.parallel.triton_grouped_gemm import triton_grouped_gemm
from tests.gpu.conftest import DRY
from tests.support.devices import draw, error

Near = Callable[[str, float, float], None]
Forward = Callable[[nn.Module, Tensor], Tensor]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTPUT = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}
GRADIENT = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 1e-2}


@pytest.fixture(autouse=True)
def drawn_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    here = router_module.RoutingNoise.__call__

    def draw_there(self: Any, shape: tuple[int, ...]) -> Tensor:
        device, self.device = self.device, torch.device("cpu")
        drawn = here(self, shape).to(device)
        self.device = device
        return drawn

    monkeypatch.setattr(router_module.RoutingNoise, "__call__", draw_there)


def on(module: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of it there."""
    return copy.deepcopy(module).to(device, dtype)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, the same everywhere."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(near: Near, module: nn.Module, device: torch.device, name: str, x: Tensor, forward: Forward) -> None:
    """Output, and the gradients of the input and of every weight."""
    results = []
    for where, dtype in ((torch.device("cpu"), torch.float32), (device, TYPES[name])):
        there, given = on(module, where, dtype), x.to(where, dtype, copy=True).requires_grad_()
        y = forward(there, given)
        y.backward(tensor(*y.shape, seed=1).to(where, dtype))
        results.append([y, given.grad, *(parameter.grad for parameter in there.parameters())])
    (expected, *gradients), (found, *others) = results
    near(f"output, {name}", error(found, expected), OUTPUT[name])
    near(f"gradients, {name}", max(map(error, others, gradients)), GRADIENT[name])


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("sees", ["causal", "padding", "documents", "cache"])
def test_attention(name: str, sees: str, device: torch.device, near: Near) -> None:
    batch, length, width, heads = (2, 16, 32, 2) if DRY else (4, 512, 512, 8)
    config = GPTConfig(8, length, 1, width, heads)
    layer = CausalSelfAttention(config, 0)
    draw(layer, std=width**-0.5)  # logits as large as those of a model
    positions = torch.arange(length)

    def forward(there: nn.Module, x: Tensor) -> Tensor:
        mask = (positions >= 5).expand(batch, -1).to(x.device) if sees == "padding" else None
        documents = (positions // 7).expand(batch, -1).to(x.device) if sees == "documents" else None
        if sees != "cache":
            y = there(x, AttentionContext.build(config, x[..., 0], mask, documents))
            return y if mask is None else y[:, 5:]
        cache, parts = KVCache(length), []
        for part in x.split([length - 5, 4, 1], dim=1):
            parts.append(there(part, AttentionContext.build(config, part[..., 0], cache=cache)))
        return torch.cat(parts, dim=1)

    x = tensor(batch, length, width)
    if sees != "cache":
        compare(near, layer, device, name, x, forward)
        return
    with torch.no_grad():
        found, expected = forward(on(layer, device, TYPES[name]), x.to(device, TYPES[name])), forward(layer, x)
    near(f"output, {name}", error(found, expected), OUTPUT[name])


def rows_of(load: str, rows: int, experts: int) -> Tensor:
    """How many of the rows each expert gets."""
    counts = torch.zeros(experts, dtype=torch.long)
    if load == "some empty":
        counts[::2] = 2 * rows // experts
    elif load == "one gets all":
        counts[experts // 3] = rows
    elif load == "one row":
        counts[-1] = 1
    return counts


LOADS = ("some empty", "one gets all", "no rows", "one row", "slots")


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("experts", [16, 128])
@pytest.mark.parametrize("load", LOADS)
def test_experts(load: str, experts: int, name: str, device: torch.device, near: Near) -> None:
    rows, width = (2 * experts, 16) if DRY else (16 * experts, 256)
    layer, counts = Experts(experts, width, 4 * width), rows_of(load, rows, experts)
    draw(layer, std=0.1)
    layer.triton_grouped_gemm = triton_grouped_gemm(device)
    x = tensor(experts, rows // experts, width) if load == "slots" else tensor(int(counts.sum()), width)

    def forward(there: nn.Module, given: Tensor) -> Tensor:
        if load == "slots":
            return there(given, None)
        y = there(given, counts.to(given.device))
        y.backward(torch.ones_like(y), retain_graph=True)  # `sum` has a gradient of strides 0, which grouped_mm refuses
        for weight, parameter in there.named_parameters():
            empty = parameter.grad[counts.to(y.device) == 0]
            near(f"gradient of empty experts, {weight}", float(empty.abs().sum()), 0.0)
            parameter.grad = None
        given.grad = None
        return y

    compare(near, layer, device, name, x, forward)


VOCABULARY = 257 if DRY else 50_257


def head(device: torch.device, name: str, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, unembedding with rows of padding, and targets."""
    width = 16 if DRY else 1024
    hidden = tensor(tokens, width).to(device, TYPES[name])
    table = (0.05 * tensor(-(-VOCABULARY // 128) * 128, width, seed=1)).to(device, TYPES[name])
    return hidden, table, torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(2)).to(device)


@pytest.mark.parametrize("name", TYPES)
def test_loss(name: str, device: torch.device, near: Near) -> None:
    """At the head's real size, with its gradient; against fp64 on the device itself, without our code. fp16 is scaled."""
    hidden, table, targets = head(device, name, 64 if DRY else 8192)
    scale, limit = 2.0**11 if name == "fp16" else 1.0, {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}[name]
    given = [hidden.clone().requires_grad_(), table.clone().requires_grad_()]
    loss = cross_entropy(given[0], given[1], VOCABULARY, targets, None, 1024)
    (loss * scale).backward()
    exact = [hidden.double().requires_grad_(), table[:VOCABULARY].double().requires_grad_()]
    total = 0.0
    for states, wanted in zip(exact[0].split(1024), targets.split(1024), strict=True):
        value = nn.functional.cross_entropy(states @ exact[1].t(), wanted, reduction="sum") / len(targets)
        value.backward()
        total += float(value)
    near(f"off fp64, {name}", abs(float(loss) - total) / total, limit)
    for part, found, expected in zip(("hidden states", "unembedding"), given, exact, strict=True):
        gradient = found.grad[: len(expected)].double() / scale
        near(f"gradient of {part} off fp64, {name}", error(gradient, expected.grad), limit)
        norms = expected.grad.norm(dim=1)
        rows = (gradient - expected.grad).norm(dim=1) / norms.clamp_min(1e-3 * norms.max())
        near(f"gradient of {part}, worst row, {name}", float(rows.max()), 0.1)
    near(f"gradient of padding, {name}", float(given[1].grad[VOCABULARY:].abs().sum()), 0.0)


MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "capacity": {"num_experts": 8},
    "jitter": {"num_experts": 8, "noise": "jitter"},
    "dropless, residual": {"num_experts": [8, 16], "token_dropping": False, "mlp_type": "residual"},
    "top-2": {"num_experts": 8, "top_k": 2, "second_expert": "argmax", "token_dropping": False},
}


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("variant", MODELS)
def test_model(variant: str, recomputed: bool, device: torch.device, near: Near) -> None:
    length, width = (16, 32) if DRY else (256, 256)
    moe = MoEConfig(**MODELS[variant]) if MODELS[variant] else None
    model = GPT(GPTConfig(257, length, 4, width, 4, init_std=0.05, moe=moe), activation_checkpointing=recomputed)
    tokens = torch.randint(257, (4, length + 1), generator=torch.Generator().manual_seed(0))
    results = []
    for where in (torch.device("cpu"), device):
        there, batch = on(model, where), tokens.to(where)
        output = there(batch[:, :-1], noise_key=(0, 0, 0))
        hidden, targets = output.hidden.flatten(0, 1), batch[:, 1:].flatten()
        loss = cross_entropy(hidden, there.unembedding, 257, targets, None, 256)
        if moe is not None:
            loss = loss + 0.01 * router_losses(output.routings)[0]
        loss.backward()
        results.append((loss, [parameter.grad for parameter in there.parameters()]))
    (expected, gradients), (found, others) = results
    total = nn.utils.get_total_norm(gradients)
    near("loss", error(found, expected), 1e-5)
    pairs = zip(gradients, others, strict=True)
    worst = max(float((other.cpu() - one).norm() / max(one.norm(), 1e-3 * total)) for one, other in pairs)
    near("gradients", worst, 1e-4)
