"""MUON: momentum whose update is made orthogonal, for the matrices of hidden layers; AdamW takes all other parameters.

    M = m M + (1 - m) G                                   G gradient, m `momentum`
    U = m M + (1 - m) G        with `nesterov`, else M
    W = (1 - lr * weight_decay) W - lr * ratio * orthogonal(U)

`orthogonal` sets the singular values of a matrix to about 1 by polynomials of the matrix (Newton-Schulz), in bf16. On the weight
of an `nn.Linear`, `[out, in]`, this is `torch.optim.Muon`; on a stack of experts, `[E, in, out]`, which torch 2.13's refuses
(pytorch#197202), it is that optimizer applied to the matrix of each expert.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon; `match_rms_adamw`: Liu et al., arXiv 2502.16982.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from nlgmoe.validation import require, require_valid

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of x -> a x + b x^3 + c x^5 on singular values; torch's default
EPS = 1e-7  # smallest norm that a matrix is divided by; torch's default


@dataclass(frozen=True)
class MuonConfig:
    """Muon for the matrices of attention, feed-forward layers and experts; on one process or with ddp.

    Rate, weight decay and `lr_scale` are AdamW's, which embeddings, head, routers, norms, biases and mixing coefficients keep.

    Attributes:
        momentum: decay of the average gradient, per optimizer step; in [0, 1).
        nesterov: the update is the average with the current gradient counted once more.
        ns_steps: number of Newton-Schulz steps, 1 to 99. More of them make the update more orthogonal and take longer.
        adjust_lr: factor of the rate by a matrix's shape. `match_rms_adamw`, 0.2 sqrt(max(in, out)), gives the update of a
            matrix of any shape a root mean square of about 0.2, as AdamW's usually has: one `lr` and `weight_decay`, tuned for
            AdamW, fit both (arXiv 2502.16982, section 2.2). `original`, sqrt(max(1, out / in)), needs another rate, such as 0.02.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"

    def __post_init__(self) -> None:
        require_valid(self)
        require(0 <= self.momentum < 1, f"momentum={self.momentum} must be in [0, 1)")
        require(1 <= self.ns_steps < 100, f"ns_steps={self.ns_steps} must be between 1 and 99; 5 is usual")


class Muon(Optimizer):
    """Muon for the parameter groups with `muon`, AdamW for all others: one optimizer with one state.

    Args:
        adamw: has all groups; it steps those without `muon`.
    """

    def __init__(self, adamw: AdamW, config: MuonConfig) -> None:
        super().__init__(adamw.param_groups, adamw.defaults)
        self.config, self._adamw = config, adamw

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; a parameter without a gradient keeps its value and state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Linked in every step: `load_state_dict` replaces state and groups.
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group.get("muon")]
        self._adamw.step()
        for group in self.param_groups:
            for parameter in group["params"] if group.get("muon") else ():
                if parameter.grad is not None:
                    self._step_matrix(parameter, group["lr"], group["weight_decay"])
        return loss

    def _step_matrix(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        gradient, state, momentum = parameter.grad, self.state[parameter], self.config.momentum
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum) if self.config.nesterov else average
        update = orthogonal(update, self.config.ns_steps)
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(update, alpha=-lr * rate_ratio(parameter.shape, self.config.adjust_lr))


def orthogonal(matrices: Tensor, steps: int) -> Tensor:
    """Return the nearest orthogonal matrix of each, approximately: singular values of 0.7 to 1.2 after 5 steps.

    Args:
        matrices: `[m, n]`, or a stack of them, `[E, m, n]`.

    Returns:
        A tensor of the same shape in bf16; a matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x  # the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)  # of each matrix: no singular value is above 1
    multiply_add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT  # [.., m, m]
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def rate_ratio(shape: torch.Size, rule: str) -> float:
    """Return the factor of the rate for the weight `[out, in]` of an `nn.Linear`, or a stack of experts `[E, in, out]`."""
    outputs, inputs = shape if len(shape) == 2 else (shape[2], shape[1])
    return math.sqrt(max(1, outputs / inputs)) if rule == "original" else 0.2 * math.sqrt(max(outputs, inputs))
