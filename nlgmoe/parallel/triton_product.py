"""DeepSpeed's product of rows with their experts' matrices in Triton, for GPUs on which PyTorch's makes the host wait."""

from __future__ import annotations

import torch
from torch import nn

from nlgmoe.device import is_accelerator
from nlgmoe.layers.moe import moe_layers


def hand_in_triton_product(model: nn.Module, device: torch.device) -> None:
    """Give DeepSpeed's product to the experts of `model` if Triton can run on `device`; `expert_products.py` chooses."""
    if not is_accelerator(device):
        return
    from deepspeed.ops.triton_ops import group_gemm_triton, is_triton_available

    if is_triton_available():
        for moe in moe_layers(model):
            moe.experts.triton_product = group_gemm_triton
