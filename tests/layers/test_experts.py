"""The two ways to compute experts agree: one after the other, and all in PyTorch's grouped kernel, which GPUs use."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers import experts as experts_module
from nlgmoe.layers.activation import Backward
from nlgmoe.layers.attention import KVCache
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.expert_kernel import KernelExperts
from nlgmoe.layers.expert_loop import LoopExperts
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.losses import cross_entropy
from nlgmoe.model.gpt import GPT
from nlgmoe.seeding import derive_seed


def _loop(x: torch.Tensor, rows: torch.Tensor, back_through_gelu: Backward) -> LoopExperts:
    return LoopExperts(rows.tolist(), x.dtype, back_through_gelu)


def _kernel(x: torch.Tensor, rows: torch.Tensor, back_through_gelu: Backward) -> KernelExperts:
    return KernelExperts(rows, back_through_gelu)


@pytest.mark.parametrize("rows", [[5, 0, 16, 3], [0, 0, 0, 24], [24, 0, 0, 0], [8, 8, 0, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_grouped_kernel_computes_the_same(
    rows: list[int], dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = Experts(4, 16, 32).to(dtype), torch.randn(12, 16).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    source, scale, seed = torch.randint(12, (24,)), torch.rand(24), torch.randn(24, 16)
    counts = torch.tensor(rows)
    results = []
    for way in (_loop, _kernel):
        monkeypatch.setattr(experts_module, "way_to_compute", way)
        inputs = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(inputs[0], counts, source, inputs[1])
        out.backward(seed)
        results.append([out, *(tensor.grad for tensor in (*inputs, *layer.parameters()))])
    half = autocast or dtype == torch.bfloat16
    tolerance = {"rtol": 3e-2, "atol": 1e-1} if half else {"rtol": 1e-5, "atol": 1e-5}
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)
    assert not results[0][0][sum(rows) :].any() and not results[1][0][sum(rows) :].any()


def test_the_way_of_gpus_never_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, dropless: nothing asks for a number, and no kernel is used that does on CUDA."""

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
    monkeypatch.setattr(experts_module, "way_to_compute", _kernel)
    for method in ("item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, method, waits)
    with NoWaiting():
        output = model(tokens, noise_key=(0, 0, 0))
        loss = cross_entropy(output.hidden.flatten(0, 1), model.unembedding, 64, tokens.flatten(), None, 16)
        (loss + sum(router_losses(output.routings))).backward()
    monkeypatch.undo()
    assert model.blocks[1].moe.router.weight.grad.any()


def test_compiled_parts_compute_the_same() -> None:
    config = GPTConfig(64, 16, 2, 16, 2, moe=MoEConfig(4, mlp_type="residual"))
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    results = []
    for compiles in (False, True):
        model = GPT(config)
        for name, parameter in model.named_parameters():  # large enough for every weight to matter
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(derive_seed(name)))
        if compiles:
            model.compile_dense_parts()
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
