"""DeepSpeed's product of rows with their experts' matrices in Triton, for GPUs on which PyTorch's makes the host wait."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nlgmoe.device import is_accelerator
from nlgmoe.layers.moe import moe_layers


def triton_product(device: torch.device) -> Callable[..., Tensor] | None:
    """Return `(rows [M, in], weight [E, in, out], ends [E]) -> [M, out]` if Triton can run on `device`, else None."""
    if not is_accelerator(device):
        return None
    from deepspeed.ops.triton_ops import group_gemm_triton, is_triton_available

    product: Callable[..., Tensor] = group_gemm_triton
    return product if is_triton_available() else None


def hand_in_triton_product(model: nn.Module, device: torch.device) -> None:
    """Give the product to all experts of `model`; `layers/expert_products.py` chooses where they use it."""
    layers = moe_layers(model)
    product = triton_product(device) if layers else None  # DeepSpeed's import takes seconds
    for moe in layers:
        moe.experts.triton_product = product
