"""DeepSpeed's grouped product in Triton, for GPUs other than Hopper, interpreted on a CPU: against the loop over experts."""

import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own: Triton reads the variable when it is imported, and DeepSpeed asks its drivers whether there is a GPU.
SCRIPT = """
import sys, torch
from triton.backends import backends
for backend in backends.values():
    backend.driver.is_active = staticmethod(lambda: True)
from deepspeed.ops.triton_ops import group_gemm_triton
kernels = sys.modules["deepspeed.ops.triton_ops.group_gemm_triton"]
for kernel in (kernels._group_gemm_kernel, kernels._group_gemm_dw_kernel):
    kernel.configs = kernel.configs[:1]  # nothing to choose by time

from nlgmoe.layers import experts
from nlgmoe.layers.experts import Experts

torch.manual_seed(0)
bias, rows = sys.argv[1] == "bias", [int(number) for number in sys.argv[2].split(",")]
layer, x = Experts(len(rows), 24, 40, bias=bias), torch.randn(sum(rows), 24, requires_grad=True)
for parameter in layer.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
probe, results = torch.randn(x.shape), []
layer.triton_grouped_gemm = group_gemm_triton
Experts._gather_bias = Experts._multiply_bias
for product in ("triton", "loop"):
    experts.choose_grouped_gemm = lambda *_, product=product: product
    y = layer(x, torch.tensor(rows))
    results.append([y, *torch.autograd.grad((y * probe).sum(), [x, *layer.parameters()])])
for triton, loop in zip(*results, strict=True):
    torch.testing.assert_close(triton, loop, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize("rows", ["5,0,33,2", "0,0,0,40", "40,0,0,0", "1,1,1,1"])
@pytest.mark.parametrize("bias", ["bias", "none"])
def test_triton_product_and_its_gradients_equal_the_loop(rows: str, bias: str) -> None:
    environment = {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, bias, rows], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
