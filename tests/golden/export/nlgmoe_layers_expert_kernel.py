# nlgmoe/layers/expert_kernel.py of nlgmoe 0.1.0, copied by `nlgmoe export`; only its imports are others.
# SPDX-License-Identifier: Apache-2.0
"""All experts at once in PyTorch's grouped GEMM, for GPUs: numbers of rows stay in their memory, nothing waits for them.

Letters as in `experts.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .nlgmoe_layers_activation import Backward, gelu, gelu_backward
from .nlgmoe_layers_expert_loop import Gradients


class KernelExperts:
    """Computes all experts with one kernel a product. The kernel leaves rows of no expert as they were: they are masked.

    Args:
        rows_per_expert: `[E]` int64.
        back_through_gelu: `gelu_backward`, or a compiled one.
    """

    def __init__(self, rows_per_expert: Tensor, back_through_gelu: Backward = gelu_backward) -> None:
        self._back_through_gelu = back_through_gelu
        self._lengths = rows_per_expert
        self._ends = rows_per_expert.cumsum(0)

    def forward(
        self, x: Tensor, source: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LoopExperts`; the second is `[M, F]`."""
        rows = x if source is None else x.index_select(0, source)
        used, expert = self._masks(rows)
        inner = self._times(rows, w1) + b1.to(rows.dtype)[expert]
        inner = torch.where(used, inner, 0)
        y = self._times(gelu(inner), w2) + b2.to(rows.dtype)[expert]
        return torch.where(used, y, 0), inner

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        source: Tensor | None,
        w1: Tensor,
        w2: Tensor,
        b2: Tensor,
        inner: Tensor,
        scale: Tensor | None,
        needed: Sequence[bool],
    ) -> Gradients:
        """See `LoopExperts`."""
        dtype = x.dtype
        rows = x if source is None else x.index_select(0, source)
        used, expert = self._masks(rows)
        grad = (grad if scale is None else grad * scale.unsqueeze(-1)).to(dtype)
        grad_act = torch.where(used, self._times(grad, w2.transpose(1, 2)), 0)  # [M, F]
        act, grad_pre, dot = self._back_through_gelu(inner, grad_act)
        grad_scale = None
        if scale is not None:
            dot = dot + torch.linalg.vecdot(grad.to(dot.dtype), b2.to(dot.dtype)[expert])
            grad_scale = torch.where(used.squeeze(-1) & (scale != 0), dot / scale, 0).to(scale.dtype)
        grad_rows = torch.where(used, self._times(grad_pre, w1.transpose(1, 2)), 0) if needed[0] else None
        if grad_rows is not None and source is not None:
            grad_rows = torch.zeros_like(x).index_add_(0, source, grad_rows)
        return (
            grad_rows,
            self._weight_gradient(rows, grad_pre).to(w1.dtype) if needed[1] else None,
            self._sums(grad_pre).to(w1.dtype) if needed[2] else None,
            self._weight_gradient(act, grad).to(w2.dtype) if needed[3] else None,
            self._sums(grad).to(b2.dtype) if needed[4] else None,
            grad_scale,
        )

    def _masks(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows belong to an expert, `[M, 1]`, and to which, `[M]`."""
        row = torch.arange(len(rows), device=rows.device)
        expert = torch.searchsorted(self._ends, row, right=True)
        return (expert < len(self._ends)).unsqueeze(-1), expert.clamp_max(len(self._ends) - 1)

    def _times(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x[rows of e] @ weight[e]`."""
        return F.grouped_mm(x, weight.to(x.dtype), offs=self._ends.to(torch.int32))

    def _weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """`x[rows of e].T @ grad[rows of e]`."""
        return F.grouped_mm(x.t(), grad, offs=self._ends.to(torch.int32))

    def _sums(self, x: Tensor) -> Tensor:
        """`x[rows of e].sum(0)`, in fp32."""
        return torch.segment_reduce(x.float(), "sum", lengths=self._lengths, unsafe=True)
