"""EXPERTS: the feed-forward networks of one MoE layer, stacked, applied to rows sorted by expert.

    y = gelu(x W_expand + b) W_project + b        for each row x, with the weights of its expert (or another network)

A network (`feed_forward.py`) declares its weights and has a `forward(x, linear)`. `linear(name, x)` applies the stack of that
name by the chosen backend: one grouped product, or expert by expert.

Letters: E experts held here, M rows (assignments sorted by expert), H hidden size, F inner size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nlgmoe.layers.feed_forward import NETWORKS, cast_by_autocast
from nlgmoe.parts import ExpertConfig, Linear
from nlgmoe.roles import Role
from nlgmoe.validation import RunError

FEW_ROWS = 8  # up to this many rows without gradients, a loop over experts is faster on a CPU than a grouped product
BIAS_WIDTH = 8  # inner width of the product that adds biases: grouped_mm requires rows of 16 bytes

Function = Callable[..., Tensor]


class Experts(nn.Module):
    """The experts of one layer that this rank holds.

    All experts' matrices of one name are one parameter, `{name}_weight` `[E, in, out]`, and so are their biases, `{name}_bias`
    `[E, out]` or None: optimizer and collectives work on few large tensors. Checkpoints store one entry per expert.

    Args:
        count: E.
        hidden_size: H.
        ffn_size: F.
        first: number of the first one in the layer; under expert parallelism a rank holds a slice.
        network: network of each expert.
        bias: its matrices have biases.
    """

    def __init__(
        self,
        count: int,
        hidden_size: int,
        ffn_size: int,
        first: int = 0,
        network: ExpertConfig = NETWORKS["gelu"],
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.first, self.count, self.network, self.bias = first, count, network, bias
        self.stacks = network.stacks(hidden_size, ffn_size)
        self.widths = tuple({width for inputs, outputs, _ in self.stacks.values() for width in (inputs, outputs)})
        self.roles: dict[str, Role] = {}
        for name, (inputs, outputs, kind) in self.stacks.items():
            self.roles |= {f"{name}_weight": "project" if kind == "project" else "weight", f"{name}_bias": "bias"}
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(count, inputs, outputs)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(count, outputs)) if bias else None)

    def forward(self, x: Tensor, tokens_per_expert: Tensor, all_used: bool = False) -> Tensor:
        """Apply expert e to its rows.

        Args:
            x: `[M, H]`: the first `tokens_per_expert[0]` rows are for expert 0 and so on.
            tokens_per_expert: `[E]` int64.
            all_used: no row is past their sum. If False, rows past it belong to no expert.

        Returns:
            `[M, H]` in the dtype of the computation; rows that belong to no expert are zero, and so is their gradient.
        """
        x = cast_by_autocast(x)
        if torch.compiler.is_dynamo_compiling() and x.device.type == "cpu" and x.dtype != torch.bfloat16:
            return _uncompiled(self, x, tokens_per_expert, all_used)
        if self._backend(x, all_used) == "loop":
            return self._loop(x, tokens_per_expert)
        linear = self._grouped(x, tokens_per_expert)
        if all_used:
            return self._apply_network(x, linear)
        # grouped_mm leaves rows of no expert uninitialised, in its output and in the gradient of its input.
        unused = (torch.arange(len(x), device=x.device) >= tokens_per_expert.sum()).unsqueeze(-1)  # [M, 1]
        return self._apply_network(x.masked_fill(unused, 0), linear).masked_fill(unused, 0)

    def _backend(self, x: Tensor, all_used: bool) -> str:
        if not torch.is_grad_enabled() and x.device.type == "cpu" and len(x) <= FEW_ROWS:
            return "loop"  # generation: reads the weights of the chosen experts only
        if not all_used and torch.is_anomaly_enabled():
            return "loop"  # anomaly detection would report NaN in rows that grouped_mm leaves uninitialised
        capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
        return select_backend(x.device.type, x.dtype, self.widths, capability)

    def _apply_network(self, x: Tensor, linear: Linear) -> Tensor:
        """Apply the network, and check that it returned a row for each row of `x`, `[M, H]`."""
        y: Any = self.network.forward(x, linear)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            returned = list(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            name = type(self.network).__name__
            raise RunError(f"{name}.forward returned {returned} for rows of {list(x.shape)}; return one row for each")
        return y

    def _grouped(self, x: Tensor, tokens_per_expert: Tensor) -> Linear:
        """Return `linear` as one grouped product; the host does not read the numbers of rows."""
        ends = tokens_per_expert.cumsum(0).to(torch.int32)  # [E]
        add_bias: Function = lambda y, bias: y  # noqa: E731
        if self.bias:
            add_bias = (self._gather_bias if x.device.type == "cpu" else self._multiply_bias)(ends, x)

        def linear(name: str, rows: Tensor) -> Tensor:
            weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")

            def product(rows: Tensor) -> Tensor:
                return F.grouped_mm(rows, weight.to(rows.dtype), offs=ends)

            # Save the weight before its cast, and cast again in the backward pass. The product is not repeated: its backward pass
            # needs only its inputs, and recomputation stops there.
            repeats = torch.is_grad_enabled() and weight.dtype != x.dtype
            return add_bias(_recomputed(product, rows) if repeats else product(rows), bias)

        return linear

    def _gather_bias(self, ends: Tensor, x: Tensor) -> Function:
        """Return a function that adds biases gathered in fp32; on CPUs a product is slower, by a third of a bf16 layer."""
        expert = torch.bucketize(torch.arange(len(x)), ends, right=True)  # [M], E where a row belongs to none
        return lambda y, bias: y.add_(F.pad(bias.float(), (0, 0, 0, 1)).index_select(0, expert))

    def _multiply_bias(self, ends: Tensor, x: Tensor) -> Function:
        """Return a function that adds biases as a product with ones: its gradient needs no atomic additions."""
        ones = F.pad(x.new_ones(len(x), 1), (0, BIAS_WIDTH - 1))  # [M, 8]: 1, 0, 0, ...
        below = (0, 0, 0, BIAS_WIDTH - 1)  # [E, out] -> [E, 8, out]
        return lambda y, bias: y.add_(F.grouped_mm(ones, F.pad(bias.to(y.dtype).unsqueeze(1), below), offs=ends))

    def _loop(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Apply the experts one by one; the host reads the numbers of rows."""
        counts, learns = tokens_per_expert.tolist(), torch.is_grad_enabled()
        chosen = [e for e, count in enumerate(counts) if count or learns]  # on every rank each weight has a gradient
        *rows, rest = x.split([*(counts[e] for e in chosen), len(x) - sum(counts)])
        # The gradient of `unbind` is one stack; indexing would add up E of them.
        stacks = {name: stack.unbind() if learns else stack for name, stack in self.named_parameters(recurse=False)}
        parts = [
            self._apply_network(part, _dense(lambda name, e=e: stacks[name][e] if name in stacks else None))  # type: ignore[misc]
            for e, part in zip(chosen, rows, strict=True)
        ]
        return torch.cat([*parts, torch.zeros_like(rest)])


def select_backend(
    device_type: str, dtype: torch.dtype, widths: tuple[int, ...], capability: tuple[int, int] | None
) -> Literal["grouped", "loop"]:
    """Choose between `grouped`, which is `F.grouped_mm`, and `loop`, one product per expert.

    Args:
        device_type: device type of the rows.
        dtype: dtype of the computation.
        widths: input and output widths of the weights, in values.
        capability: compute capability of a CUDA device; None elsewhere.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or any(w * dtype.itemsize % 16 for w in widths):
        return "loop"  # grouped_mm takes no fp64, and needs rows of a multiple of 16 bytes
    if device_type != "cuda":
        return "grouped"
    # On other GPUs grouped_mm is a loop too, and the host waits in each of its calls. On sm_100 it leaves the weight gradients of
    # empty experts uninitialised (pytorch#172439).
    return "grouped" if dtype == torch.bfloat16 and capability is not None and capability[0] == 9 else "loop"


@torch.compiler.disable
def _uncompiled(experts: Experts, x: Tensor, tokens_per_expert: Tensor, all_used: bool) -> Tensor:
    """Apply experts between compiled parts: on a CPU grouped_mm computes in fp32, but its compiled form takes bf16 only."""
    y: Tensor = experts(x, tokens_per_expert, all_used)
    return y


def _dense(parameter: Callable[[str], Tensor | None]) -> Linear:
    """Return `linear` for one expert, whose weights are `parameter(name)`, or None."""

    def linear(name: str, rows: Tensor) -> Tensor:
        weight, bias = parameter(f"{name}_weight"), parameter(f"{name}_bias")
        assert weight is not None
        weight = weight.to(rows.dtype)
        return rows @ weight if bias is None else torch.addmm(bias.to(rows.dtype), rows, weight)

    return linear


def _recomputed(function: Function, *inputs: Tensor) -> Tensor:
    """Compute `function(*inputs)`; keep only the inputs for the backward pass."""
    y: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    return y
