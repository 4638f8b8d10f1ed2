"""The two ways to compute experts agree: one after the other, and all in PyTorch's grouped kernel, which GPUs use."""

import pytest
import torch

from nlgmoe.layers import experts as experts_module
from nlgmoe.layers.activation import Activation
from nlgmoe.layers.expert_kernel import KernelExperts
from nlgmoe.layers.expert_loop import LoopExperts
from nlgmoe.layers.experts import Experts


def _loop(x: torch.Tensor, rows: torch.Tensor, activation: Activation) -> LoopExperts:
    return LoopExperts(rows.tolist(), x.dtype, activation)


def _kernel(x: torch.Tensor, rows: torch.Tensor, activation: Activation) -> KernelExperts:
    return KernelExperts(rows, activation)


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
