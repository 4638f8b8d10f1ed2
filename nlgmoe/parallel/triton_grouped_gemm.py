"""DeepSpeed's grouped GEMM in Triton, for GPUs on which PyTorch's makes the host wait."""

import os
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch
from torch import Tensor, nn

from nlgmoe.device import is_accelerator
from nlgmoe.layers.moe import moe_layers


def _grouped_gemm(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Compute `(rows [M, in], weight [E, in, out], offs [E]) -> [M, out]`."""
    from deepspeed.ops.triton_ops import group_gemm_triton  # takes seconds, and few GPUs need it

    y: Tensor = group_gemm_triton(rows, weight, offs)
    return y


def triton_grouped_gemm(device: torch.device) -> Callable[..., Tensor] | None:
    """Return the kernel if Triton can run on `device`, else None."""
    # Triton compiles a part of each kernel in C.
    compiles = "CC" in os.environ or any(map(which, ("gcc", "clang")))
    compiles = compiles and Path(sysconfig.get_path("include"), "Python.h").is_file()
    return _grouped_gemm if is_accelerator(device) and find_spec("triton") is not None and compiles else None


def set_triton_grouped_gemm(model: nn.Module, device: torch.device) -> None:
    """Set the kernel in all experts of `model`; `layers/grouped_gemm.py` chooses where they use it."""
    for moe in moe_layers(model):
        moe.experts.triton_grouped_gemm = triton_grouped_gemm(device)
