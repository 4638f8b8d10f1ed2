"""EXPERTS: the feed-forward networks of one MoE layer, stacked, applied to rows sorted by expert.

    y = gelu(x W_up + b) W_down + b        for each row x, with the weights of its expert (or another network)

A network (`feed_forward.py`) declares its weights and has a `forward(x, linear)`. `linear(name, x)` applies the stack of that
name by the kernel that `grouped_gemm.py` chooses: one grouped GEMM of all experts, or expert by expert.

Letters: E experts held here, M rows (assignments sorted by expert), S slots for rows of each expert, H hidden size, F inner size.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nlgmoe.layers.feed_forward import NETWORKS
from nlgmoe.layers.grouped_gemm import GroupedGEMM, choose_grouped_gemm, compute_capability
from nlgmoe.layers.precision import cast_by_autocast
from nlgmoe.parts import ExpertConfig, Linear
from nlgmoe.roles import Role

FEW_ROWS = 8  # up to this many rows without gradients, a loop over experts is faster on a CPU than a grouped GEMM
BIAS_WIDTH = 8  # inner width of the product that adds biases: grouped_mm requires rows of 16 bytes

Function = Callable[..., Tensor]


class Experts(nn.Module):
    """The experts of one layer that this rank holds.

    All experts' matrices of one name are one parameter, `{name}_weight` `[E, in, out]`, and so are their biases, `{name}_bias`
    `[E, out]` or None: optimizer and collectives work on few large tensors. Checkpoints store one entry per expert.

    The first one has the number `first` in the layer: under expert parallelism a rank holds a slice.
    """

    # `(rows [M, in], weight [E, in, out], offs [E]) -> [M, out]` for GPUs; None unless `set_triton_grouped_gemm` sets it.
    triton_grouped_gemm: Function | None = None

    def __init__(
        self,
        count: int,  # E
        hidden_size: int,  # H
        ffn_size: int,  # F
        first: int = 0,
        network: ExpertConfig = NETWORKS["gelu"],
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.first, self.count, self.network, self.bias = first, count, network, bias
        self.stacks = network.weights(hidden_size, ffn_size)
        self.widths = tuple({width for inputs, outputs, _ in self.stacks.values() for width in (inputs, outputs)})
        self.roles: dict[str, Role] = {}
        for name, (inputs, outputs, role) in self.stacks.items():
            self.roles |= {f"{name}_weight": role, f"{name}_bias": "bias"}
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(count, inputs, outputs)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(count, outputs)) if bias else None)

    def forward(self, x: Tensor, tokens_per_expert: Tensor | None) -> Tensor:
        """Apply expert e to its rows. Returns `y` of the shape of `x`, in the dtype of the computation.

        Args:
            x: `[M, H]`: the first `tokens_per_expert[0]` rows are for expert 0 and so on; or `[E, S, H]` in slots.
            tokens_per_expert: `[E]` int64, M in all; None: `x` is in slots.
        """
        x = cast_by_autocast(x)
        if torch.compiler.is_dynamo_compiling() and x.device.type == "cpu" and x.dtype != torch.bfloat16:
            return _uncompiled(self, x, tokens_per_expert)
        if tokens_per_expert is None or not len(x):  # grouped kernels are never called without rows
            rows = x.flatten(0, -2)  # [M, H], as networks expect them
            return self.network.forward(rows, self._in_slots(len(rows) // self.count)).view_as(x)
        if not torch.is_grad_enabled() and x.device.type == "cpu" and len(x) <= FEW_ROWS:
            return self._loop(x, tokens_per_expert)  # generation: reads the weights of the chosen experts only
        has_triton = self.triton_grouped_gemm is not None
        chosen = choose_grouped_gemm(x.dtype, self.widths, compute_capability(x.device), False, has_triton)
        if chosen == "loop":
            return self._loop(x, tokens_per_expert)
        return self.network.forward(x, self._grouped(chosen, x, tokens_per_expert))

    def _in_slots(self, slots: int) -> Linear:
        """Return `linear` for rows in slots, as one batched product."""

        def linear(name: str, rows: Tensor) -> Tensor:
            weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
            y = _multiply(torch.bmm, rows.unflatten(0, (self.count, slots)), weight)  # [E, S, out]
            return (y if bias is None else y.add_(bias.unsqueeze(1))).flatten(0, 1)

        return linear

    def _grouped(self, chosen: GroupedGEMM, x: Tensor, tokens_per_expert: Tensor) -> Linear:
        """Return `linear` as one grouped GEMM; the host does not read the numbers of rows."""
        ends = tokens_per_expert.cumsum(0).to(torch.int32)  # [E]
        kernel = self.triton_grouped_gemm if chosen == "triton" else F.grouped_mm
        assert kernel is not None
        product: Function = partial(kernel, offs=ends)
        add_bias: Function | None = None
        if self.bias:
            add_bias = (self._gather_bias if x.device.type == "cpu" else self._multiply_bias)(product, ends, x)

        def linear(name: str, rows: Tensor) -> Tensor:
            y = _multiply(product, rows, getattr(self, f"{name}_weight"))
            return y if add_bias is None else add_bias(y, getattr(self, f"{name}_bias"))

        return linear

    def _gather_bias(self, _: Function, ends: Tensor, x: Tensor) -> Function:
        """Return a function that adds biases gathered in fp32; on CPUs a product is slower, by a third of a bf16 layer."""
        expert = torch.bucketize(torch.arange(len(x)), ends, right=True)  # [M]
        return lambda y, bias: y.add_(bias.float().index_select(0, expert))

    def _multiply_bias(self, product: Function, ends: Tensor, x: Tensor) -> Function:
        """Return a function that adds biases as a product with ones: its gradient needs no atomic additions."""
        ones = F.pad(x.new_ones(len(x), 1), (0, BIAS_WIDTH - 1))  # [M, 8]: 1, 0, 0, ...
        below = (0, 0, 0, BIAS_WIDTH - 1)  # [E, out] -> [E, 8, out]
        return lambda y, bias: y.add_(product(ones, F.pad(bias.to(y.dtype).unsqueeze(1), below)))

    def _loop(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Apply the experts one by one; the host reads the numbers of rows."""
        counts, learns = tokens_per_expert.tolist(), torch.is_grad_enabled()
        chosen = [e for e, count in enumerate(counts) if count or learns]  # on every rank each weight has a gradient
        rows = x.split([counts[e] for e in chosen])
        # The gradient of `unbind` is one stack; indexing would add up E of them.
        named = {name: stack for name in self.roles if (stack := getattr(self, name)) is not None}  # PEFT computes them
        stacks = {name: stack.unbind() if learns else stack for name, stack in named.items()}
        parts = [
            self.network.forward(part, _dense(lambda name, e=e: stacks[name][e] if name in stacks else None))  # type: ignore[misc]
            for e, part in zip(chosen, rows, strict=True)
        ]
        return torch.cat(parts)


@torch.compiler.disable
def _uncompiled(experts: Experts, x: Tensor, tokens_per_expert: Tensor | None) -> Tensor:
    """Apply experts between compiled parts: on a CPU grouped_mm computes in fp32, but its compiled form takes bf16 only."""
    y: Tensor = experts(x, tokens_per_expert)
    return y


def _dense(parameter: Callable[[str], Tensor | None]) -> Linear:
    """Return `linear` for one expert, whose weights are `parameter(name)`, or None."""

    def linear(name: str, rows: Tensor) -> Tensor:
        weight, bias = parameter(f"{name}_weight"), parameter(f"{name}_bias")
        assert weight is not None
        weight = weight.to(rows.dtype)
        return rows @ weight if bias is None else torch.addmm(bias.to(rows.dtype), rows, weight)

    return linear


def _multiply(product: Function, rows: Tensor, weight: Tensor) -> Tensor:
    """Compute `product(rows, weight)` in the dtype of the rows.

    If the weight is cast, the backward pass casts it again instead of keeping the copy. PyTorch's products are not repeated:
    recomputation stops at their inputs. Triton's is: its inputs are saved after it.
    """
    if not torch.is_grad_enabled() or weight.dtype == rows.dtype:
        y: Tensor = product(rows, weight.to(rows.dtype))
        return y
    cast: Function = lambda rows: product(rows, weight.to(rows.dtype))  # noqa: E731
    y = checkpoint(cast, rows, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    return y
