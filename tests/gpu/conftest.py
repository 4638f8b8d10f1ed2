"""What the tests on a GPU share. NLGMOE_GPU_DRY_RUN=1 runs them at tiny shapes on the CPU, as `make gpu DRY_RUN=1` does."""

import importlib
import math
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

DRY = os.environ.get("NLGMOE_GPU_DRY_RUN") == "1"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def device(record_testsuite_property: Callable[[str, object], None]) -> torch.device:
    """The GPU, with fp32 products in fp32."""
    if DRY:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    record_testsuite_property("card", torch.cuda.get_device_name())
    if find_spec("triton") is not None:  # one of the six block sizes: to try all takes a minute for the tests' shapes
        module = importlib.import_module("deepspeed.ops.triton_ops.group_gemm_triton")
        for kernel in (module._group_gemm_kernel, module._group_gemm_dw_kernel):
            del kernel.configs[1:]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def poisoned(device: torch.device) -> None:
    """The memory that the allocator hands out next is full of NaN: what nobody writes, nobody may read."""
    sizes = [2**12] * 256 + [2**18] * 64 + [2**24] * (1 if DRY else 16)
    kept = [torch.full((size,), torch.nan, device=device) for size in sizes]
    del kept


@pytest.fixture
def near(record_property: Callable[[str, object], None]) -> Iterator[Callable[[str, float, float], None]]:
    """Hold an error against its limit: `near(name, error, at_most)`. All are recorded; the test fails at its end."""
    missed = []

    def hold(name: str, error: float, at_most: float) -> None:
        record_property(name, (error, at_most))
        if not (math.isfinite(error) and error <= at_most):
            missed.append(f"{name}: {error:.3g} is above {at_most:g}")

    yield hold
    assert not missed, "\n".join(missed)
