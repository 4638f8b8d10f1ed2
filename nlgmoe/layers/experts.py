"""EXPERTS: the feed-forward networks of one MoE layer, stacked, applied to tokens sorted by expert.

Letters: E experts held here, M rows (assignments sorted by expert), H hidden size, F inner size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nlgmoe.layers.feed_forward import gelu


class Experts(nn.Module):
    """`count` networks `x -> gelu(x @ expand + b) @ project + b`, each with weights of its own.

    One stacked parameter per weight instead of thousands of small ones: the optimizer and the collectives see few large
    tensors. Checkpoints store one entry per expert (`checkpoint/portable.py`).

    Args:
        count: E.
        hidden_size: H.
        ffn_size: F.
        first: number of the first of them within the layer: under expert parallelism a rank holds a slice.
    """

    def __init__(self, count: int, hidden_size: int, ffn_size: int, first: int = 0) -> None:
        super().__init__()
        self.first = first
        self.expand_weight = nn.Parameter(torch.empty(count, hidden_size, ffn_size))
        self.expand_bias = nn.Parameter(torch.empty(count, ffn_size))
        self.project_weight = nn.Parameter(torch.empty(count, ffn_size, hidden_size))
        self.project_bias = nn.Parameter(torch.empty(count, hidden_size))

    def forward(self, x: Tensor, rows_per_expert: Tensor) -> Tensor:
        """Apply expert e to its rows of `x`.

        Args:
            x: `[M, H]`, the first `rows_per_expert[0]` rows for expert 0 and so on; rows past the sum belong to none.
            rows_per_expert: `[E]` int64.

        Returns:
            `[M, H]`; rows that belong to no expert are zero.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        inner = gelu(grouped_linear(x, self.expand_weight, self.expand_bias, rows_per_expert))  # [M, F]
        return grouped_linear(inner, self.project_weight, self.project_bias, rows_per_expert)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, rows_per_expert: Tensor) -> Tensor:
    """`x[rows of e] @ weight[e] + bias[e]` for every expert e, in the dtype of `x`.

    Args:
        x: `[M, K]`, sorted by expert.
        weight: `[E, K, L]`.
        bias: `[E, L]`.
        rows_per_expert: `[E]` int64 whose sum is at most M.

    Returns:
        `[M, L]`, zero in rows past the sum.
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return _one_kernel(x, weight, bias, rows_per_expert)
    out: Tensor = _GroupedLinear.apply(x, weight, bias, rows_per_expert.tolist())
    return out


def _one_kernel(x: Tensor, weight: Tensor, bias: Tensor, rows_per_expert: Tensor) -> Tensor:
    """The same in PyTorch's grouped GEMM, whose sizes stay on the GPU: nothing waits for them."""
    ends = rows_per_expert.cumsum(0)
    row = torch.arange(len(x), device=x.device)
    used = (row < ends[-1]).unsqueeze(
        -1
    )  # [M, 1]; the kernel leaves rows past the sum as they were, forward and backward
    expert = torch.searchsorted(ends, row, right=True).clamp_max(len(ends) - 1)  # [M]
    out = F.grouped_mm(torch.where(used, x, 0), weight, offs=ends.to(torch.int32))
    # The gradient of a bias sums many rows: in fp32.
    return torch.where(used, out + bias.float()[expert].to(out.dtype), 0)


class _GroupedLinear(torch.autograd.Function):
    """One GEMM per expert that has rows, written straight into preallocated results.

    Plain autograd over `weight[e]` makes a gradient of the whole stack per expert, quadratic in E; here each expert's
    gradient is written into its slice of one tensor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rows: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        out = x.new_empty(x.shape[0], weight.shape[-1])
        for expert, part in _slices(rows):
            torch.addmm(bias[expert], x[part], weight[expert], out=out[part])
        out[sum(rows) :] = 0
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows, used = ctx.rows, sum(ctx.rows)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = grad.new_zeros(weight.shape[0], weight.shape[-1]) if needs_bias else None
        if grad_x is not None:
            grad_x[used:] = 0
        if grad_weight is not None:
            for expert, count in enumerate(rows):
                if count == 0:
                    grad_weight[expert].zero_()
        for expert, part in _slices(rows):
            if grad_x is not None:
                torch.mm(grad[part], weight[expert].t(), out=grad_x[part])
            if grad_weight is not None:
                torch.mm(x[part].t(), grad[part], out=grad_weight[expert])
            if grad_bias is not None:
                torch.sum(grad[part], dim=0, out=grad_bias[expert])
        return grad_x, grad_weight, grad_bias, None


def _slices(rows: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any."""
    found, start = [], 0
    for expert, count in enumerate(rows):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found
