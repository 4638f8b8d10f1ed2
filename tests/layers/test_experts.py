"""The two ways to compute grouped linear maps agree: one GEMM an expert, and PyTorch's grouped kernel, which GPUs use."""

import pytest
import torch

from nlgmoe.layers.experts import _one_kernel, grouped_linear


@pytest.mark.parametrize("rows", [[5, 0, 16, 3], [0, 0, 0, 24], [24, 0, 0, 0], [8, 8, 0, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_grouped_kernel_computes_the_same(rows: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (24, 16), "weight": (4, 16, 32), "bias": (4, 32), "seed": (24, 32)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    counts = torch.tensor(rows)
    results = []
    for function in (grouped_linear, _one_kernel):
        inputs = [made[name].clone().requires_grad_() for name in ("x", "weight", "bias")]
        out = function(*inputs, counts)
        out.backward(made["seed"])
        results.append([out, *(tensor.grad for tensor in inputs)])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    assert not results[0][0][sum(rows) :].any()
