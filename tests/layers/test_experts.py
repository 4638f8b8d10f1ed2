"""The two computations of experts agree with each other and with a loop over rows; which is chosen; what is never read."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers import dispatch
from nlgmoe.layers import experts as experts_module
from nlgmoe.layers.attention import KVCache
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.experts import Experts, select_backend
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.model.compiling import compile_dense_parts
from nlgmoe.model.gpt import GPT
from nlgmoe.seeding import derive_seed
from tests.support.programs import needs


@pytest.fixture
def memory_full_of_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # new memory is then filled with NaN
    yield
    torch.use_deterministic_algorithms(False)


def backward(layer: Experts, x: torch.Tensor, rows: list[int], all_used: bool, autocast: bool) -> list[torch.Tensor]:
    """The output and all gradients."""
    leaf, seed = x.clone().requires_grad_(), torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(leaf, torch.tensor(rows), all_used)
    y.backward(seed.to(y.dtype))
    return [y, leaf.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.usefixtures("memory_full_of_nan")
@pytest.mark.parametrize("rows", [[5, 0, 16, 3], [0, 0, 0, 24], [24, 0, 0, 0], [8, 8, 0, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_grouped_product_equals_the_loop(
    rows: list[int], dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = Experts(4, 16, 32), torch.randn(24, 16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer, x = layer.to(dtype), x.to(dtype)
    used = sum(rows)
    results = []
    for backend in ("grouped", "loop"):
        monkeypatch.setattr(experts_module, "select_backend", lambda *_, backend=backend: backend)
        results.append(backward(layer, x, rows, False, autocast))
        exact = backward(layer, x[:used], rows, True, autocast)  # without the rows of no expert
        for whole, part in zip(results[-1], exact, strict=True):
            assert torch.equal(whole[:used] if whole.shape == x.shape else whole, part)
    half = autocast or dtype != torch.float32
    for grouped, loop in zip(*results, strict=True):
        assert grouped.dtype == loop.dtype
        torch.testing.assert_close(
            grouped, loop, **({"rtol": 3e-2, "atol": 1e-1} if half else {"rtol": 1e-5, "atol": 1e-5})
        )
        if grouped.shape == x.shape:
            assert not grouped[used:].any(), "a row of no expert is not zero"
        else:
            idle = [expert for expert, number in enumerate(rows) if not number]
            assert not grouped[idle].any() and not loop[idle].any(), "an expert without rows has a gradient"


@pytest.mark.parametrize(
    "expected, device, dtype, widths, capability",
    [
        ("grouped", "cpu", torch.float32, (256, 1024), None),
        ("grouped", "cpu", torch.float16, (8, 16), None),
        ("loop", "cpu", torch.float64, (256, 1024), None),  # grouped_mm refuses it
        ("loop", "cpu", torch.bfloat16, (16, 20), None),  # rows of 40 bytes
        ("grouped", "privateuseone", torch.float32, (256, 1024), None),
        ("grouped", "cuda", torch.bfloat16, (256, 1024), (9, 0)),
        ("loop", "cuda", torch.bfloat16, (256, 1020), (9, 0)),
        ("loop", "cuda", torch.float32, (256, 1024), (9, 0)),
        ("loop", "cuda", torch.bfloat16, (256, 1024), (8, 0)),
    ],
)
def test_the_backend_follows_from_device_type_and_widths(
    expected: str, device: str, dtype: torch.dtype, widths: tuple[int, int], capability: tuple[int, int] | None
) -> None:
    assert select_backend(device, dtype, widths, capability) == expected
    if device == "cpu" and expected == "grouped":  # grouped_mm takes what is sent to it
        assert Experts(2, *widths).to(dtype)(torch.zeros(3, widths[0], dtype=dtype), torch.tensor([1, 2])).shape[0] == 3


def test_no_number_is_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, dropless: the host asks for no number, and no kernel is used that makes it wait on CUDA."""

    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in {"_local_scalar_dense", "bincount", "nonzero", "masked_select", "unique", "equal"}, name
            assert not (name == "repeat_interleave" and "output_size" not in (kwargs or {})), name
            return func(*args, **(kwargs or {}))

    def waits(*_: object) -> None:
        raise AssertionError("a tensor's value was asked for")

    config = GPTConfig(64, 16, 2, 16, 2, moe=MoEConfig(4, mlp_type="residual", token_dropping=False))
    model, tokens = GPT(config).to(torch.bfloat16), torch.randint(64, (2, 16))
    for method in ("item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, method, waits)
    monkeypatch.setattr(dispatch, "computing_dtype", lambda x: torch.float32)  # rows are rounded up on CPUs alone
    with NoWaiting():
        output = model(tokens, noise_key=(0, 0, 0))
        loss = cross_entropy(output.hidden.flatten(0, 1), model.unembedding, 64, tokens.flatten(), None, 16)
        (loss + sum(router_losses(output.routings))).backward()
    monkeypatch.undo()
    assert model.blocks[1].moe.router.weight.grad.any()


QWEN3 = {"norm": "rmsnorm", "rope_theta": 100.0, "qk_norm": "head", "num_kv_heads": 1, "bias": False}


GLM4 = {"norm": "rmsnorm", "rope_theta": 100.0, "rotary_dim": 4, "qkv_bias": True, "bias": False, "residual_scale": 0.5}


@pytest.mark.parametrize("block", [{}, QWEN3, GLM4], ids=["gpt", "qwen3", "glm4"])
def test_compiled_parts_compute_the_same(block: dict[str, Any]) -> None:
    needs("g++")
    config = GPTConfig(64, 16, 2, 16, 2, **block, moe=MoEConfig(4, mlp_type="residual"))
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    results = []
    for compiles in (False, True):
        model = GPT(config)
        for name, parameter in model.named_parameters():  # large enough for every weight to matter
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(derive_seed(name)))
        if compiles:
            compile_dense_parts(model)
            counters.clear()
        for step, length in enumerate((16, 16, 12, 9)):  # other loads, other shapes; a second length makes it symbolic
            part = tokens.roll(step)[:, :length]
            output = model(part, noise_key=(0, step, 0))
            cross_entropy(output.hidden.flatten(0, 1), model.unembedding, 64, part.flatten(), None, 16).backward()
        results.append([output.hidden, *(parameter.grad for parameter in model.parameters())])
        cache = KVCache(16)
        results[-1] += [model.eval()(part, cache=cache).hidden for part in tokens.split([3, 1, 12], dim=1)]
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
