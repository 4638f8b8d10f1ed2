"""The grouped GEMM: the product of each expert's rows with its matrix. Which kernel computes it, by device and type.

training with a capacity of at most      `bmm`         slots, equally many for each expert: `torch.bmm`; any type
    `MAX_SLOTS` per assignment, on
    accelerators and between ranks
else: CPUs in fp32, bf16, fp16           `grouped_mm`  `F.grouped_mm`
      Hopper in bf16                     `grouped_mm`
      other GPUs in bf16, fp16           `triton`      DeepSpeed's Triton kernel (`parallel/triton_grouped_gemm.py`)
      others                             `loop`        one product for each expert; the host reads the numbers of rows

On other GPUs and in other types `F.grouped_mm` is a loop too, in which the host waits at each call.
"""

from typing import Literal

import torch
from torch import Tensor

from nlgmoe.config import GPTConfig
from nlgmoe.layers.router import capacity

GroupedGEMM = Literal["bmm", "grouped_mm", "triton", "loop"]

ROW_MULTIPLE = 32  # of an expert, on CPUs in half precision (docs/performance.md)
MAX_SLOTS = 1.25  # per assignment; with more, padding costs more than what slots save
HALF = (torch.bfloat16, torch.float16)


def choose_grouped_gemm(
    dtype: torch.dtype,
    widths: tuple[int, ...],
    compute_capability: tuple[int, int] | None,
    in_slots: bool,
    has_triton: bool,
) -> GroupedGEMM:
    """Choose the kernel, by the input and output widths of the weights, in values.

    Only CUDA devices have a compute capability. With `has_triton` the model has the Triton kernel.
    """
    if in_slots:
        return "bmm"
    # grouped_mm takes no fp64, and needs rows of a multiple of 16 bytes.
    fits = dtype in (torch.float32, *HALF) and not any(width * dtype.itemsize % 16 for width in widths)
    if compute_capability is None:
        return "grouped_mm" if fits else "loop"
    # On sm_100 grouped_mm leaves the weight gradients of empty experts uninitialised (pytorch#172439).
    if fits and dtype == torch.bfloat16 and compute_capability[0] == 9:
        return "grouped_mm"
    # In fp32 DeepSpeed's Triton kernel rounds its inputs to TF32. Triton needs compute capability 8.0.
    return "triton" if has_triton and dtype in HALF and compute_capability >= (8, 0) else "loop"


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a CUDA device; None for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def has_slots(device: torch.device) -> bool:
    """Return whether experts with a capacity have slots on one device; CPUs count rows, which is faster (docs/results/log.md)."""
    return device.type != "cpu"


def fixed_slots(capacity: int | None, num_experts: int, assignments: int) -> int | None:
    """Return the slots of each expert if its `capacity` leaves few of them empty; None: rows must be counted.

    Ranks whose micro-batches have equally many tokens get equal results.
    """
    return None if capacity is None or capacity * num_experts > MAX_SLOTS * assignments else capacity


def round_up_rows(index: Tensor, tokens_per_expert: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat the last row of each expert until their number is round, on CPUs in half precision.

    oneDNN compiles a kernel for each number of rows there, and each keeps memory. Round is a multiple of `ROW_MULTIPLE`, or of a
    quarter of the largest power of two in the number if that is less: 9 -> 10, 17 -> 20, 65 -> 80, 129 -> 160. So an expert gets
    at most a quarter more rows, and none below 9, as in generation. The outputs of repeated rows are not read, so that their
    gradients are zero.

    Args:
        index: `[R]` of the rows to gather, sorted by expert.
        tokens_per_expert: `[e]` int64, R in all.
        dtype: of the computation.

    Returns:
        `index` with repetitions, `[M]`; the place of each row in it, `[R]`; rows per expert, `[e]`. Elsewhere M is R.
    """
    if index.device.type != "cpu" or dtype.itemsize != 2:
        return index, torch.arange(len(index), device=index.device), tokens_per_expert
    exponent = torch.frexp(tokens_per_expert.float()).exponent  # 2^(exponent - 1) <= rows < 2^exponent
    multiple = (2 ** (exponent - 3).clamp_min(0)).clamp_max(ROW_MULTIPLE)
    repeated = -tokens_per_expert % multiple  # [e]
    last = (tokens_per_expert.cumsum(0) - 1).clamp_min(0)
    times = torch.ones_like(index).index_add_(0, last, repeated)  # [R]
    return index.repeat_interleave(times), times.cumsum(0) - times, tokens_per_expert + repeated


def training_slots(config: GPTConfig, num_experts: int, tokens: int) -> int | None:
    """Return `fixed_slots` in training of a layer of `num_experts` for N `tokens`; None for routers without a capacity."""
    moe = config.moe
    if moe is None or not moe.token_dropping or "token_dropping" not in moe.router_fields:
        return None
    limit = capacity(tokens, num_experts, moe.top_k, moe.train_capacity_factor, moe.min_capacity)
    return fixed_slots(limit, num_experts, tokens * moe.top_k)
