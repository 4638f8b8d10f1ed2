"""Muon for the matrices of hidden layers, whose update is orthogonal; AdamW for all other parameters.

    M = m M + (1 - m) G                                   G gradient, m `momentum`
    U = m M + (1 - m) G        with `nesterov`, else M
    W = (1 - lr * weight_decay) W - lr * ratio * orthogonal(U)

`orthogonal` sets the singular values of a matrix to about 1 by polynomials of the matrix (Newton-Schulz). On the weight of an
`nn.Linear`, `[out, in]`, this is `torch.optim.Muon`; on a stack of experts, `[E, in, out]`, which torch 2.13's refuses
(pytorch#197202), it is that optimizer applied to the matrix of each expert.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon; `match_rms_adamw`: Liu et al., arXiv 2502.16982.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from nlgmoe.validation import require, require_valid

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of x -> a x + b x^3 + c x^5 on singular values; torch's default
EPS = 1e-7  # smallest norm that a matrix is divided by; torch's default
STACKED = 2**18  # values of matrices of one shape that are multiplied together (docs/results/performance.md)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class MuonConfig:
    """Muon for the matrices of attention, feed-forward layers and experts.

    Learning rate, weight decay and `lr_scale` are AdamW's, which embeddings, head, routers, norms, biases and mixing
    coefficients keep.

    Attributes:
        momentum: decay of the average gradient, per optimizer step; in [0, 1).
        nesterov: the update is the average with the current gradient counted once more.
        ns_steps: number of Newton-Schulz steps, 1 to 99. More of them make the update more orthogonal and take longer.
        adjust_lr: factor of the learning rate by a matrix's shape. `match_rms_adamw`, 0.2 sqrt(max(in, out)), gives the update
            of a matrix of any shape a root mean square of about 0.2, as AdamW's usually has: one `lr` and `weight_decay`, tuned
            for AdamW, fit both (arXiv 2502.16982, section 2.2). `original`, sqrt(max(1, out / in)), needs another learning
            rate, such as 0.02.
        ns_precision: type of the Newton-Schulz steps' products on any device: `bf16`, or `fp32` for comparisons, where a
            GPU takes several times as long.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    ns_precision: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        require_valid(self)
        require(0 <= self.momentum < 1, f"momentum={self.momentum} must be in [0, 1)")
        require(1 <= self.ns_steps < 100, f"ns_steps={self.ns_steps} must be between 1 and 99; 5 is usual")


class Shard(Protocol):
    """A part of the flat values of several matrices, the rest of which other ranks hold (`parallel/muon.py`)."""

    def orthogonalise_(self, update: Tensor) -> None:
        """Replace this rank's part of an update by that of its orthogonal matrices, times `rate_ratio`. A collective."""


class Muon(Optimizer):
    """Muon for the parameter groups with `muon`, AdamW for all others: one optimizer with one state.

    Attributes:
        shards: of the parameters that are no matrices, but shards of many.
    """

    def __init__(self, adamw: AdamW, config: MuonConfig) -> None:
        """Take over the groups of `adamw`, which steps those without `muon`."""
        super().__init__(adamw.param_groups, adamw.defaults)
        self.config, self._adamw = config, adamw
        self.shards: dict[Tensor, Shard] = {}

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
        groups = [group for group in self.param_groups if group.get("muon")]
        settings = {
            parameter: (group["lr"], group["weight_decay"])
            for group in groups
            for parameter in group["params"]
            if parameter.grad is not None
        }
        matrices = [parameter for parameter in settings if parameter not in self.shards]
        for batch in batches([parameter.shape for parameter in matrices]):
            parameters = [matrices[index] for index in batch]
            updates = orthogonalise([self._average(parameter) for parameter in parameters], self.config)
            for parameter, update in zip(parameters, updates, strict=True):
                lr, weight_decay = settings[parameter]
                parameter.mul_(1 - lr * weight_decay)
                parameter.add_(update, alpha=-lr * rate_ratio(parameter.shape, self.config.adjust_lr))
        for parameter in (parameter for parameter in settings if parameter in self.shards):
            lr, weight_decay = settings[parameter]
            update = self._average(parameter, out=parameter.grad)  # a copy, which ZeRO frees after the step
            self.shards[parameter].orthogonalise_(update)
            parameter.mul_(1 - lr * weight_decay)
            parameter.add_(update, alpha=-lr)
        return loss

    def _average(self, parameter: Tensor, out: Tensor | None = None) -> Tensor:
        """Add the gradient to the momentum, and return the update before it is orthogonal."""
        gradient, state, momentum = parameter.grad, self.state[parameter], self.config.momentum
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, average, momentum if self.config.nesterov else 1.0, out=out)


def batches(shapes: Sequence[torch.Size]) -> list[list[int]]:
    """Return the indices of matrices and stacks that are orthogonalised together: of one shape, at most `STACKED` values."""
    closed: list[list[int]] = []
    filling: dict[tuple[int, ...], tuple[list[int], int]] = {}  # shape, either way round -> indices, values
    for index, shape in enumerate(shapes):
        kind = tuple(sorted(shape[-2:]))
        indices, values = filling.get(kind, ([], 0))
        if indices and values + shape.numel() > STACKED:
            closed.append(indices)
            indices, values = [], 0
        filling[kind] = [*indices, index], values + shape.numel()
    return closed + [indices for indices, _ in filling.values()]


def orthogonalise(matrices: Sequence[Tensor], config: MuonConfig) -> list[Tensor]:
    """Return the nearest orthogonal matrix of each, approximately, in `config.ns_precision`.

    Each is `[m, n]`, or a stack `[E, m, n]`; all have the same m and n, or n and m. Their products are taken together.
    """
    dtype = DTYPES[config.ns_precision]
    if len(matrices) == 1:
        return [newton_schulz(matrices[0].to(dtype), config.ns_steps)]
    is_tall = [matrix.shape[-2] > matrix.shape[-1] for matrix in matrices]
    wide = [matrix.mT if tall else matrix for matrix, tall in zip(matrices, is_tall, strict=True)]
    stack = torch.cat([matrix.to(dtype).reshape(-1, *matrix.shape[-2:]) for matrix in wide])  # [all, m, n]
    parts = newton_schulz(stack, config.ns_steps).split([matrix.shape[:-2].numel() for matrix in wide])
    results = [part.view(matrix.shape) for part, matrix in zip(parts, wide, strict=True)]
    return [result.mT if tall else result for result, tall in zip(results, is_tall, strict=True)]


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Set the singular values of a matrix `[m, n]`, or of each of a stack `[E, m, n]`, to 0.7 to 1.2 (after 5 steps).

    In the matrices' type. A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)  # of each matrix: no singular value is above 1
    multiply_add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT  # [.., m, m]
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def newton_schulz_flops(shape: torch.Size, steps: int) -> int:
    """Return the FLOPs of `newton_schulz` for a matrix `[m, n]` or a stack `[E, m, n]`: three products a step."""
    small, large = sorted(shape[-2:])
    return steps * shape[:-2].numel() * (4 * small**2 * large + 2 * small**3)


def rate_ratio(shape: torch.Size, rule: str) -> float:
    """Return the factor of the learning rate for a weight `[out, in]` of `nn.Linear`, or a stack of experts `[E, in, out]`."""
    outputs, inputs = shape if len(shape) == 2 else (shape[2], shape[1])
    return math.sqrt(max(1, outputs / inputs)) if rule == "original" else 0.2 * math.sqrt(max(outputs, inputs))
