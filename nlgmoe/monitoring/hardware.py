"""What a GPU can do: the published peaks that `cost.py` divides by.

Numbers are the vendor's data sheets' for the SXM boards (NVIDIA V100, A100, H100 and H200 Tensor Core GPU data sheets), dense
rates without sparsity, one direction of a link. A network card per GPU is the vendor's own 8-GPU server: DGX-1 4 x 100
Gbit/s for 8 GPUs, DGX A100 8 x 200, DGX H100 and H200 8 x 400. Your cluster's network may be slower.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in its usual server.

    Attributes:
        half_flops: peak FLOP/s of fp16 and bf16 matrix products.
        fp32_flops: peak FLOP/s of fp32 ones (not TF32, which PyTorch does not use unless told to).
        memory: bytes.
        memory_bandwidth: bytes/s of the GPU's own memory.
        nvlink: bytes/s that one GPU sends to the others of its node.
        network: bytes/s that one GPU sends to other nodes while all GPUs of the node do.
        gpus_per_node: GPUs joined by NVLink.
    """

    half_flops: float
    fp32_flops: float
    memory: float
    memory_bandwidth: float
    nvlink: float
    network: float
    gpus_per_node: int = 8


# A marketing "40 GB" of a GPU is 40 GiB of memory.
HARDWARE = {
    "v100-32": Hardware(125e12, 15.7e12, 32 * 2**30, 0.9e12, 150e9, 6.25e9),
    "a100-40": Hardware(312e12, 19.5e12, 40 * 2**30, 1.555e12, 300e9, 25e9),
    "a100-80": Hardware(312e12, 19.5e12, 80 * 2**30, 2.039e12, 300e9, 25e9),
    "h100": Hardware(989e12, 67e12, 80 * 2**30, 3.35e12, 450e9, 50e9),
    "h200": Hardware(989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
}

RESERVED = 2 * 2**30
"""Bytes of a GPU that tensors cannot have: CUDA context, cuBLAS workspace, NCCL buffers, fragmentation. A rule of thumb."""


def hardware(name: str) -> Hardware:
    """The GPU called `name`.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    if name not in HARDWARE:
        raise ValueError(f"hardware={name} is not known; choose one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


BOARDS = {  # parts of the names that GPUs give themselves -> name above; other boards of a chip have other peaks
    ("V100", "SXM"): "v100-32",
    ("A100",): "a100-80",
    ("H100", "HBM3"): "h100",
    ("H200",): "h200",
}


def peak_of(gpu: str, precision: str, tf32: bool) -> float | None:
    """FLOP/s of the matrix products of a run, by data sheet; None if this is no GPU of those above.

    Args:
        gpu: what it calls itself.
        precision: as Lightning writes it, such as `bf16-mixed`.
        tf32: whether PyTorch computes fp32 products that way.
    """
    found = next((name for parts, name in BOARDS.items() if all(part in gpu for part in parts)), None)
    if found is None or "64" in precision:
        return None
    peaks = HARDWARE[found]
    if "16" in precision:
        return peaks.half_flops
    return (
        peaks.half_flops / 2 if tf32 and found != "v100-32" else peaks.fp32_flops
    )  # TF32 is half of bf16, since Ampere
