"""The two computations of experts agree with each other and with a loop over rows; which is chosen; what is never read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers import dispatch
from nlgmoe.layers import experts as experts_module
from nlgmoe.layers.attention import KVCache
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.feed_forward import NETWORKS, FeedForward
from nlgmoe.layers.grouped_gemm import choose_grouped_gemm
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.model.gpt import GPT
from nlgmoe.module import compile_dense_parts
from nlgmoe.parallel import triton_grouped_gemm
from tests.support.devices import draw
from tests.support.programs import needs


@pytest.fixture
def memory_full_of_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # new memory is then filled with NaN
    yield
    torch.use_deterministic_algorithms(False)


def backward(layer: Experts, x: torch.Tensor, rows: list[int], slots: int | None, autocast: bool) -> list[torch.Tensor]:
    """The output and all gradients; with `slots`, each expert's rows are in its first ones, and the others hold noise."""
    leaf, seed = x.clone().requires_grad_(), torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    layer.zero_grad()
    inputs, tokens_per_expert, place = leaf, torch.tensor(rows), torch.arange(len(x))
    if slots is not None:
        place = torch.cat([torch.arange(n) + e * slots for e, n in enumerate(rows)])
        wide = torch.randn(len(rows) * slots, x.shape[1]).to(x.dtype).index_copy(0, place, leaf)
        inputs, tokens_per_expert = wide.unflatten(0, (len(rows), slots)), None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(inputs, tokens_per_expert).flatten(0, -2)[place]
    y.backward(seed.to(y.dtype))
    return [y, leaf.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.usefixtures("memory_full_of_nan")
@pytest.mark.parametrize("rows", [[5, 0, 16, 3], [0, 0, 0, 24], [24, 0, 0, 0], [8, 8, 0, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_products_of_all_experts_equal_the_loop(
    rows: list[int], dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = Experts(4, 16, 32), torch.randn(sum(rows), 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    draw(layer, std=0.3)
    layer.to(dtype)
    results = {"bmm": backward(layer, x, rows, 24, autocast)}
    for product in ("grouped_mm", "loop"):
        monkeypatch.setattr(experts_module, "choose_grouped_gemm", lambda *_, product=product: product)
        results[product] = backward(layer, x, rows, None, autocast)
    half = autocast or dtype != torch.float32
    near = {"rtol": 3e-2, "atol": 1e-1} if half else {"rtol": 1e-5, "atol": 1e-5}
    idle = [expert for expert, number in enumerate(rows) if not number]
    for product in ("bmm", "grouped_mm"):
        for found, loop in zip(results[product], results["loop"], strict=True):
            assert found.dtype == loop.dtype
            torch.testing.assert_close(found, loop, **near)
            if found.shape != x.shape:
                assert not found[idle].any() and not loop[idle].any(), "an expert without rows has a gradient"


@pytest.mark.parametrize("network", NETWORKS)
def test_dense_feed_forward_equals_one_expert(network: str) -> None:
    """The dense layer is compared with that of `transformers` in tests/equivalence."""
    layer, rows = Experts(3, 16, 24, network=NETWORKS[network]), [2, 0, 5]
    draw(layer, std=0.3)
    dense = [FeedForward(GPTConfig(8, 8, 1, 16, 1, ffn_network=network), 24) for _ in rows]
    for index, one in enumerate(dense):
        for name, module in one.named_children():
            module.weight.data = getattr(layer, f"{name}_weight").detach()[index].t().contiguous()
            module.bias.data = getattr(layer, f"{name}_bias").detach()[index].clone()
    x = torch.randn(7, 16)
    y = layer(x, torch.tensor(rows))
    expected = torch.cat([one(part) for one, part in zip(dense, x.split(rows), strict=True)])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (y.square().sum() + expected.square().sum()).backward()
    for index, one in enumerate(dense):
        for name, module in one.named_children():
            gradient = getattr(layer, f"{name}_weight").grad[index].t()
            wanted = module.weight.grad if rows[index] else torch.zeros_like(gradient)
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_experts_that_are_not_chosen_are_not_read() -> None:
    """The few rows of generation, which experts compute one by one."""
    moe = GPT(GPTConfig(61, 16, 2, 16, 2, moe=MoEConfig(8, top_k=2))).eval().blocks[1].moe
    draw(moe, std=0.3)
    x = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(2))
    expected, routing = moe(x)
    idle = sorted(set(range(8)) - set(routing.expert.flatten().tolist()))
    assert len(idle) >= 4
    for parameter in moe.experts.parameters():
        parameter[idle] = float("nan")
    assert torch.equal(moe(x)[0], expected)
    register_parametrization(moe.experts, "up_weight", torch.nn.Identity())  # as PEFT's adapters
    assert torch.equal(moe(x)[0], expected)


HALF, WIDTHS = torch.bfloat16, (256, 1024)


@pytest.mark.parametrize(
    ("expected", "given"),  # given: dtype, widths, compute capability, in slots, has Triton
    [
        ("grouped_mm", (torch.float32, WIDTHS, None, False, False)),
        ("loop", (torch.float64, WIDTHS, None, False, False)),  # grouped_mm refuses it
        ("grouped_mm", (HALF, WIDTHS, (9, 0), False, True)),
        ("bmm", (HALF, WIDTHS, (9, 0), True, True)),
        ("triton", (torch.float16, WIDTHS, (9, 0), False, True)),
        ("triton", (HALF, WIDTHS, (10, 0), False, True)),
        ("loop", (torch.float32, WIDTHS, (8, 0), False, True)),  # it would compute in TF32
    ],
)
def test_the_product_follows_from_device_type_widths_and_slots(expected: str, given: tuple[Any, ...]) -> None:
    dtype, widths, capability, *_ = given
    assert choose_grouped_gemm(*given) == expected
    if capability is None and expected == "grouped_mm":  # it takes what is sent to it
        assert Experts(2, *widths).to(dtype)(torch.zeros(3, widths[0], dtype=dtype), torch.tensor([1, 2])).shape[0] == 3


@pytest.mark.parametrize(("compiler", "header"), [(None, True), ("/usr/bin/gcc", False), ("/usr/bin/gcc", True)])
def test_triton_needs_a_c_compiler_and_pythons_headers(
    compiler: str | None, header: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_grouped_gemm, "find_spec", lambda name: name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton_grouped_gemm, "which", lambda name: compiler)
    monkeypatch.setattr(triton_grouped_gemm.sysconfig, "get_path", lambda name: tmp_path)
    if header:
        (tmp_path / "Python.h").touch()
    assert (triton_grouped_gemm.triton_grouped_gemm(torch.device("cuda")) is not None) == bool(compiler and header)


def test_moe_layer_reads_no_number_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(dispatch, "has_slots", lambda device: True)  # on CPUs alone rows are counted, and rounded up
    monkeypatch.setattr(dispatch, "computing_dtype", lambda x: torch.float32)
    with NoWaiting():
        output = model(tokens, noise_key=(0, 0, 0))
        loss = cross_entropy(output.hidden.flatten(0, 1), model.unembedding, 64, tokens.flatten(), None, 16)
        (loss + sum(router_losses(output.routings))).backward()
    monkeypatch.undo()
    assert model.blocks[1].moe.router.weight.grad.any()


QWEN3 = {"norm": "rmsnorm", "rope_theta": 100.0, "qk_norm": "head", "num_kv_heads": 1, "bias": False}
GLM4 = {"norm": "rmsnorm", "rope_theta": 100.0, "rotary_dim": 4, "qkv_bias": True, "bias": False, "residual_scale": 0.5}


@pytest.mark.parametrize("block", [{}, QWEN3, GLM4], ids=["gpt", "qwen3", "glm4"])
def test_compiled_parts_of_experts_compute_the_same(block: dict[str, Any]) -> None:
    needs("g++")
    config = GPTConfig(64, 16, 2, 16, 2, **block, moe=MoEConfig(4, mlp_type="residual"))
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    results = []
    for compiles in (False, True):
        model = GPT(config)
        draw(model, std=0.3)  # large enough for every weight to matter
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
