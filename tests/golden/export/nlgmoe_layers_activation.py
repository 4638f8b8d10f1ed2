# nlgmoe/layers/activation.py of nlgmoe 0.1.0, copied by `nlgmoe export`; only its imports are others.
# SPDX-License-Identifier: Apache-2.0
"""GELU in its tanh form, as GPT-2 and the paper's models use it, and all that the experts' backward pass wants of it at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_SLOPE = 2 * math.sqrt(2 / math.pi)  # gelu(x) = x * sigmoid(_SLOPE * (x + _CUBE * x^3)), the same as with tanh
_CUBE = 0.044715

Backward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def gelu(x: Tensor) -> Tensor:
    """`0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`."""
    return F.gelu(x, approximate="tanh")


def gelu_backward(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is needed to go back through `y = gelu(x)`; `x` and `grad`, the gradient of y, are `[..., F]`.

    Returns:
        y, the gradient of x, and `<y, grad>` over the last dimension in at least fp32.
    """
    y = gelu(x)
    dot = (y * grad).sum(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return y, torch.ops.aten.gelu_backward(grad, x, approximate="tanh"), dot


def _written_out(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`gelu_backward` for the compiler, which makes one loop of it: each value is read once and written once."""
    wide, g = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (x, grad))
    square = wide * wide
    gate = torch.sigmoid(_SLOPE * wide * (1 + _CUBE * square))
    y = wide * gate
    slope = gate + y * (1 - gate) * _SLOPE * (1 + 3 * _CUBE * square)
    return y.to(x.dtype), (g * slope).to(x.dtype), (y * g).sum(dim=-1)


def compiled_gelu_backward() -> Backward:
    """`gelu_backward`, compiled at the first use by `torch.compile`, for any number of rows."""
    return torch.compile(_written_out, dynamic=True)
