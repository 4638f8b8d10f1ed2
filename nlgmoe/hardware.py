"""Published memory and peak rates of GPUs, for the planner and for MFU.

Source: NVIDIA's data sheets of the SXM boards (V100, A100, H100 and H200 Tensor Core GPU), dense rates without sparsity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nlgmoe.validation import require


@dataclass(frozen=True)
class Hardware:
    """A GPU.

    Attributes:
        half_flops: peak FLOP/s of fp16 and bf16 matrix products.
        fp32_flops: peak FLOP/s of fp32 matrix products (not TF32, which is off in PyTorch by default).
        memory: bytes.
    """

    half_flops: float
    fp32_flops: float
    memory: float


# A marketing "40 GB" of a GPU is 40 GiB of memory.
HARDWARE = {
    "v100-32": Hardware(125e12, 15.7e12, 32 * 2**30),
    "a100-40": Hardware(312e12, 19.5e12, 40 * 2**30),
    "a100-80": Hardware(312e12, 19.5e12, 80 * 2**30),
    "h100": Hardware(989e12, 67e12, 80 * 2**30),
    "h200": Hardware(989e12, 67e12, 141e9),
}

RESERVED = 2 * 2**30
"""Bytes of a GPU unavailable to tensors: CUDA context, cuBLAS workspace, NCCL buffers, fragmentation. An estimate."""


def hardware_named(name: str) -> Hardware:
    """Return the GPU called `name`."""
    require(name in HARDWARE, f"hardware={name} is not known; choose one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


BOARDS = {  # pattern of CUDA's device name -> name in `HARDWARE`; other boards of a chip have other peaks
    r"\bV100-SXM": "v100-32",
    r"\bA100\b": "a100-80",
    r"\bH100\b.*HBM3": "h100",
    r"\bH200\b": "h200",
}


def board_of(gpu: str) -> str | None:
    """Return the name in `HARDWARE` of CUDA's device name; None for a GPU that is not in `BOARDS`."""
    if "NVL" in gpu:  # has other peaks than the SXM board
        return None
    return next((name for pattern, name in BOARDS.items() if re.search(pattern, gpu)), None)


def peak_of(gpu: str, precision: str, tf32: bool) -> float | None:
    """Return the peak FLOP/s of matrix products in a precision; None for a GPU that is not in `BOARDS`.

    With `tf32` PyTorch computes fp32 products in TF32.
    """
    board = board_of(gpu)
    if board is None or "64" in precision:
        return None
    peaks = HARDWARE[board]
    if "16" in precision:
        return peaks.half_flops
    has_tf32 = board != "v100-32"  # since Ampere, at half the rate of bf16
    return peaks.half_flops / 2 if tf32 and has_tf32 else peaks.fp32_flops
