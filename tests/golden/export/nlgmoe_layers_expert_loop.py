# nlgmoe/layers/expert_loop.py of nlgmoe 0.1.0, copied by `nlgmoe export`; only its imports are others.
# SPDX-License-Identifier: Apache-2.0
"""Experts a few neighbours at a time, as batched GEMMs whose inner values stay in the cache.

A GEMM of one expert's few rows is too small to share among threads; a batch of them is not. Neighbours in the stack need no
copy of their weights, and write their gradients where they belong. Their rows are padded to the longest of the group, with rows
that weigh nothing. In half precision lengths are rounded up so that they recur: the library compiles a kernel for each that is
new to it.

Weights may be of another type than rows (autocast): they are converted when they are used. Letters as in `experts.py`; G experts
of a group, m rows of each with its padding, P rows of all groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .nlgmoe_layers_activation import Backward, gelu, gelu_backward

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
GROUP = 4  # most experts
# Padding that a batch is worth: rows an expert on average, and a share of the rows. In half precision a row is cheap beside
# what a product takes to begin.
PADDING, PADDING_HALF = (8, 1 / 8), (24, 1 / 4)


class LoopExperts:
    """Computes experts group by group.

    Args:
        rows: of each expert, sorted by expert.
        dtype: of the rows.
        back_through_gelu: `gelu_backward`, or a compiled one.
    """

    def __init__(self, rows: list[int], dtype: torch.dtype, back_through_gelu: Backward = gelu_backward) -> None:
        self._back_through_gelu = back_through_gelu
        half = dtype in (torch.bfloat16, torch.float16)
        self._used = sum(rows)
        hit = [expert for expert, number in enumerate(rows) if number]
        self._count = len(rows)
        self._groups: list[tuple[slice, int, int]] = []  # experts, where their rows begin, m
        self._rows = [rows[expert] for expert in hit]
        self._shifts: list[int] = []  # from where an expert's rows are to where they stand with padding
        start, total, at = 0, 0, 0
        while at < len(hit):
            size = _size_of_group(hit, self._rows, at, PADDING_HALF if half else PADDING)
            longest = max(self._rows[at : at + size])
            padded = _rounded(longest) if half else longest
            self._groups.append((slice(hit[at], hit[at] + size), total, padded))
            for number in self._rows[at : at + size]:
                self._shifts.append(total - start)
                start += number
                total += padded
            at += size
        self._total = total
        self._padding = total > self._used
        self._found: tuple[Tensor, Tensor] | None = None

    def forward(
        self, x: Tensor, source: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Outputs `[M, H]`, 0 in rows of no expert, and what `backward` needs, `[P, F]`."""
        dtype = x.dtype
        place, origin = self._places(x, source)
        rows = x if origin is None else x.index_select(0, origin)  # [P, H]
        inner = rows.new_empty(self._total, w1.shape[-1])
        y = rows.new_empty(self._total, rows.shape[1])
        for (experts, part), count in self._parts():
            pre = inner[part].unflatten(0, (count, -1))  # [G, m, F]
            torch.baddbmm(
                b1[experts, None].to(dtype), rows[part].unflatten(0, (count, -1)), w1[experts].to(dtype), out=pre
            )
            out = y[part].unflatten(0, (count, -1))  # [G, m, H]
            torch.baddbmm(b2[experts, None].to(dtype), gelu(pre), w2[experts].to(dtype), out=out)
        return self._unpadded(y, place, len(x) if source is None else len(source)), inner

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
        """Gradients of x, w1, b1, w2, b2, those that are `needed`, and of the scale if there is one.

        The scale goes to the gradient before anything else, while that is narrow (`[P, H]`); its own gradient is divided by it
        at the end. Where a gate's weight is 0, its gradient is too.
        """
        dtype = x.dtype
        place, origin = self._places(x, source)
        rows = x if origin is None else x.index_select(0, origin)  # [P, H]
        g_all = self._with_padding(grad if scale is None else grad * scale.unsqueeze(-1), place, dtype)
        grad_rows = rows.new_empty(self._total, rows.shape[1]) if needed[0] else None
        grad_w1, grad_w2 = (torch.empty_like(w) if n else None for w, n in ((w1, needed[1]), (w2, needed[3])))
        grad_b1 = w1.new_zeros(len(w1), w1.shape[-1]) if needed[2] else None
        grad_b2 = torch.zeros_like(b2) if needed[4] else None
        grad_scale = None if scale is None else scale.new_empty(self._total)
        idle = set(range(self._count)).difference(*(range(experts.start, experts.stop) for experts, *_ in self._groups))
        for stack in (grad_w1, grad_w2):
            if stack is not None:
                for expert in idle:
                    stack[expert].zero_()
        for (experts, part), count in self._parts():
            a, pre, g = (
                t[part].unflatten(0, (count, -1)) for t in (rows, inner, g_all)
            )  # [G, m, H], [G, m, F], [G, m, H]
            grad_act = torch.bmm(g, w2[experts].to(dtype).transpose(1, 2))  # [G, m, F]; 0 in padding
            act, grad_pre, dot = self._back_through_gelu(pre, grad_act)
            if grad_w2 is not None:
                _product(act.transpose(1, 2), g, grad_w2[experts])
            if grad_b2 is not None:
                torch.sum(g, dim=1, dtype=grad_b2.dtype, out=grad_b2[experts])
            if grad_w1 is not None:
                _product(a.transpose(1, 2), grad_pre, grad_w1[experts])
            if grad_b1 is not None:
                torch.sum(grad_pre, dim=1, dtype=grad_b1.dtype, out=grad_b1[experts])
            if grad_rows is not None:
                torch.bmm(
                    grad_pre, w1[experts].to(dtype).transpose(1, 2), out=grad_rows[part].unflatten(0, (count, -1))
                )
            if grad_scale is not None:
                of_bias = (g * b2[experts, None].to(dtype)).sum(dim=-1, dtype=grad_scale.dtype)
                torch.add(dot, of_bias, out=grad_scale[part].view(count, -1))
        if grad_scale is not None and scale is not None:
            grad_scale = self._unpadded(grad_scale, place, len(scale))
            grad_scale = torch.where(scale == 0, 0, grad_scale / scale)
        return self._to_origin(grad_rows, x, source, origin, place), grad_w1, grad_b1, grad_w2, grad_b2, grad_scale

    def _parts(self) -> Iterator[tuple[tuple[slice, slice], int]]:
        """(experts, their rows), G."""
        for experts, start, padded in self._groups:
            count = experts.stop - experts.start
            yield (experts, slice(start, start + count * padded)), count

    def _places(self, x: Tensor, source: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Where each row that is used stands among the padded ones, and which row of `x` each padded one is."""
        if not self._padding:
            return None, None if source is None else source[: self._used]
        if self._found is None:
            lengths = torch.tensor(self._rows, device=x.device)
            place = torch.arange(self._used, device=x.device)
            place += torch.tensor(self._shifts, device=x.device).repeat_interleave(lengths, output_size=self._used)
            origin = place.new_zeros(self._total)  # padding is any row: it weighs nothing
            origin[place] = torch.arange(self._used, device=x.device) if source is None else source[: self._used]
            self._found = place, origin  # for the backward pass: 16 bytes a row, beside thousands of activations
        return self._found

    def _with_padding(self, values: Tensor, place: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`[M, ...] -> [P, ...]`, 0 in padding."""
        values = values[: self._used].to(dtype)
        if place is None:
            return values
        return values.new_zeros(self._total, *values.shape[1:]).index_copy_(0, place, values)

    def _unpadded(self, values: Tensor, place: Tensor | None, count: int) -> Tensor:
        """`[P, ...] -> [M, ...]`, 0 in rows of no expert."""
        values = values if place is None else values.index_select(0, place)
        return (
            values
            if len(values) == count
            else torch.cat([values, values.new_zeros(count - len(values), *values.shape[1:])])
        )

    def _to_origin(
        self, grad_rows: Tensor | None, x: Tensor, source: Tensor | None, origin: Tensor | None, place: Tensor | None
    ) -> Tensor | None:
        """The gradient of `x` from that of its rows."""
        if grad_rows is None:
            return None
        if source is None:
            return self._unpadded(grad_rows, place, len(x))
        assert origin is not None
        return torch.zeros_like(x).index_add_(0, origin, grad_rows)


def _size_of_group(hit: list[int], rows: list[int], at: int, padding: tuple[float, float]) -> int:
    """How many experts, from the `at`-th that is hit, make a group: neighbours, while not much padding is needed."""
    size = 1
    while at + size < len(hit) and size < GROUP and hit[at + size] == hit[at] + size:
        together = rows[at : at + size + 1]
        if max(together) * len(together) - sum(together) > min(padding[0] * len(together), sum(together) * padding[1]):
            break
        size += 1
    return size


def _rounded(number: int) -> int:
    """Up by at most a sixteenth: 16 different lengths between a number and its double."""
    step = 1 << max(number.bit_length() - 5, 0)
    return -(-number // step) * step


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out[...] = a @ b`, in the type of `a` and `b`."""
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))
