# nlgmoe/layers/experts.py of nlgmoe 0.1.0, copied by `nlgmoe export`; only its imports are others.
# SPDX-License-Identifier: Apache-2.0
"""EXPERTS: the feed-forward networks of one MoE layer, stacked, applied to tokens sorted by expert.

    y = s * (gelu(x W_1 + b_1) W_2 + b_2)      for each row x, with the weights of its expert and its own scale s

Kept for the backward pass: the layer's input, which is there anyway, and x W_1 + b_1. The rest is cheaper to compute again than
to keep, and y is never needed: the gradient of s is <dy W_2^T, gelu(.)> + <dy, b_2>, and dy W_2^T is on the way to that of x. The
scale goes to dy before anything else, while that is narrow, and the gradient of s is divided by it at the end; where a gate's
weight is 0, so is its gradient (a softmax that has come to 0 passes none on).

Letters: E experts held here, N tokens, M rows (assignments sorted by expert), H hidden size, F inner size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .nlgmoe_layers_activation import Backward, gelu, gelu_backward
from .nlgmoe_layers_expert_kernel import KernelExperts
from .nlgmoe_layers_expert_loop import LoopExperts

FEW = 8  # assignments at most that are quicker one by one than in order


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
        self.back_through_gelu: Backward = gelu_backward
        self.expand_weight = nn.Parameter(torch.empty(count, hidden_size, ffn_size))
        self.expand_bias = nn.Parameter(torch.empty(count, ffn_size))
        self.project_weight = nn.Parameter(torch.empty(count, ffn_size, hidden_size))
        self.project_bias = nn.Parameter(torch.empty(count, hidden_size))

    def forward(
        self, x: Tensor, rows_per_expert: Tensor, source: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Apply expert e to its rows.

        Args:
            x: `[N, H]`, or `[M, H]` if there is no `source`.
            rows_per_expert: `[E]` int64: the first `rows_per_expert[0]` rows are for expert 0 and so on; rows past the sum
                belong to none.
            source: `[M]` int64, which row of `x` each row is; None: they are those of `x` in order.
            scale: `[M]`, what each row's output is multiplied by, in at least fp32; None: by nothing.

        Returns:
            `[M, H]`, in the dtype of the computation, or of `scale` if there is one; rows that belong to no expert are zero.
        """
        x = _as_autocast(x)
        weights = self.expand_weight, self.expand_bias, self.project_weight, self.project_bias
        y: Tensor = _ExpertFFN.apply(x, *weights, source, scale, rows_per_expert, self.back_through_gelu)
        return y

    def takes_one_by_one(self, x: Tensor, assignments: int) -> bool:
        """Whether `one_by_one` is the quicker way for `x`, such as the token of a sequence that is being generated.

        It is where nothing goes back through it and the host need not wait for a GPU to say who goes where.
        """
        return assignments <= FEW and x.device.type == "cpu" and not torch.is_grad_enabled()

    def one_by_one(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """What `forward` and `Dispatch` do together, without putting rows in order: only weights of experts hit are touched.

        Args:
            x: `[N, H]`.
            expert: `[N, k]` int64, all of them held here.
            weight: `[N, k]` of each in the output, in at least fp32.

        Returns:
            `[N, H]` weighted sums, in the dtype of `weight`.
        """
        x, rows = _as_autocast(x), []
        stacks = self.expand_weight, self.expand_bias, self.project_weight, self.project_bias
        same = stacks[0].dtype == x.dtype
        tokens = x.split(1) if len(x) > 1 else (x,)  # [1, H] each
        for token, chosen in zip(tokens, expert.tolist(), strict=True):
            for e in chosen:
                w1, b1, w2, b2 = [stack[e] if same else stack[e].to(x.dtype) for stack in stacks]
                rows.append(torch.addmm(b2, gelu(torch.addmm(b1, token, w1)), w2))
        y = torch.cat(rows) if len(rows) > 1 else rows[0]  # [N * k, H]
        if expert.shape[1] == 1:
            return y * weight
        return (y.unflatten(0, expert.shape) * weight.unsqueeze(-1)).sum(dim=1)


def _as_autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def way_to_compute(
    x: Tensor, rows_per_expert: Tensor, back_through_gelu: Backward = gelu_backward
) -> LoopExperts | KernelExperts:
    """PyTorch's grouped kernel where it has one for `x`, else expert by expert.

    The kernel takes the numbers of rows from the GPU's memory; the loop needs them on the host.
    """
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return KernelExperts(rows_per_expert, back_through_gelu)
    return LoopExperts(rows_per_expert.tolist(), x.dtype, back_through_gelu)


class _ExpertFFN(torch.autograd.Function):
    """All experts' networks in one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        source: Tensor | None,
        scale: Tensor | None,
        rows_per_expert: Tensor,
        back_through_gelu: Backward,
    ) -> Tensor:
        way = way_to_compute(x, rows_per_expert, back_through_gelu)
        y, inner = way.forward(x, source, w1, b1, w2, b2)
        ctx.way = way
        ctx.save_for_backward(x, w1, w2, b2, source, scale, inner)
        return y if scale is None else y * scale.unsqueeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, b2, source, scale, inner = ctx.saved_tensors
        needed = ctx.needs_input_grad
        *gradients, grad_scale = ctx.way.backward(grad.contiguous(), x, source, w1, w2, b2, inner, scale, needed[:5])
        return *gradients, None, grad_scale if needed[6] else None, None, None
