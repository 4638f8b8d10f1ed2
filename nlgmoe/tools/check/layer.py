"""A layer under test: how it is built and called, and what it declares of itself.

Letters: B sequences, T positions, N = B * T tokens, H hidden size, E experts, k experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nlgmoe.layers.routing import Routing
from nlgmoe.roles import declared_roles

VOCABULARY = 61  # ids that `Batch.random` draws
STD = 0.3  # of the weights, less for more than 16 inputs: logits of a few units


class Failed(Exception):
    """The layer lacks a property; the message has the numbers."""


class NotApplicable(Exception):
    """The property cannot be tested on the layer; the message has the reason."""


@dataclass(frozen=True)
class Batch:
    """Inputs of a layer."""

    x: Tensor  # `[B, T, H]` hidden states
    tokens: Tensor  # `[B, T]` ids, for routers that read them
    mask: Tensor | None = None  # `[B, T]` bool, False at padding; None: no padding
    first_position: int = 0  # of each sequence
    noise_key: tuple[int, ...] | None = None  # `RoutingContext.noise_key`; None: draw from torch's global generator

    @staticmethod
    def random(layer: Layer, sequences: int, length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
        """Draw a batch from N(0, 1)."""
        generator = torch.Generator("cpu").manual_seed(seed)
        x = torch.randn(sequences, length, layer.hidden_size, generator=generator, dtype=torch.float64)
        tokens = torch.randint(VOCABULARY, (sequences, length), generator=generator)
        return Batch(x.to(dtype), tokens)

    def __getitem__(self, index: Any) -> Batch:
        """Return some of the sequences, or of `[sequences, positions]`."""
        mask = None if self.mask is None else self.mask[index]
        return replace(self, x=self.x[index], tokens=self.tokens[index], mask=mask)

    def tracked(self) -> Batch:
        """Return the batch with an `x` that gets a gradient."""
        return replace(self, x=self.x.detach().clone().requires_grad_())


@dataclass(frozen=True)
class Output:
    """Outputs of a layer."""

    y: Tensor  # `[B, T, H]`
    routing: Routing | None = None  # choices, weights and kept assignments; None: the layer does not return them
    aux: Tensor | None = None  # auxiliary loss, coefficients applied; None: the layer has none
    other: Tensor | None = None  # its terms that do not balance, such as a z-loss

    @property
    def balance(self) -> Tensor:
        """Return the terms of the auxiliary loss that balance the load."""
        if self.aux is None:
            raise NotApplicable("the layer has no auxiliary loss")
        balance = self.aux if self.other is None else self.aux - self.other
        if float(balance.detach().abs()) == 0:
            raise NotApplicable("the layer has no auxiliary loss that balances, it is 0")
        return balance

    @property
    def loss(self) -> Tensor:
        """Return a loss of the output plus the auxiliary loss."""
        return self.y.square().sum() + (0 if self.aux is None else self.aux)


@dataclass(frozen=True)
class Layer:
    """A kind of MoE layer; a subclass builds and calls it. Properties that need a fact it leaves out are "not applicable"."""

    name: str  # in the table
    hidden_size: int = 16  # H
    num_experts: int = 8  # E
    top_k: int = 1  # k
    # Sum of a token's weights over kept choices; `free` where they are not normalised; None: not declared.
    weight_sum: float | Literal["free"] | None = None
    # Order in which assignments take the capacity of an expert: `position` has the first choices of all tokens first.
    order: Literal["random", "position", "score"] | None = None  # None: not declared
    takes_mask: bool = False  # `forward` reads `Batch.mask`
    drops: bool | None = None  # training has a capacity, `capacity`, or drops nothing; None: not declared
    drops_in_evaluation: bool = False  # evaluation is declared to drop tokens
    estimated_gradient: bool = False  # gradients of the gate, and through it, are declared an estimate
    takes_key: bool = False  # `forward` passes `Batch.noise_key` on; random numbers then depend on nothing else

    @property
    def sizes(self) -> str:
        """Return the sizes of the layer, for the heading of the table."""
        return f"{self.num_experts} experts, top_k {self.top_k}, width {self.hidden_size}"

    def build(self) -> nn.Module:
        """Make the module, on the default device."""
        raise NotImplementedError

    def forward(self, module: nn.Module, batch: Batch) -> Output:
        """Call the module."""
        raise NotImplementedError

    def without_dispatch(self, module: nn.Module, batch: Batch) -> Output:
        """Compute `forward` without a dispatch that reads values on a CPU, though not on an accelerator, if this is known."""
        return self.forward(module, batch)

    def after_step(self, module: nn.Module, routings: Sequence[Routing]) -> bool:
        """Update state after an optimizer step; returns False if the layer has none."""
        return False

    def make(self, dtype: torch.dtype = torch.float64, training: bool = True, seed: int = 0) -> nn.Module:
        """Build the module with weights that are drawn anew, wide enough that every expert is chosen; scales are near 1."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            module = self.build()
        generator = torch.Generator("cpu").manual_seed(seed)
        for child in module.modules():
            scales = {"weight"} if isinstance(child, nn.LayerNorm | nn.RMSNorm) else set()
            scales |= {name for name, role in declared_roles(child).items() if role == "scale"}
            for name, parameter in child.named_parameters(recurse=False):
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                width = parameter.shape[-1] if parameter.dim() > 1 else 1
                parameter.data.copy_(draw * STD * min(1, 4 / math.sqrt(width)) + (name in scales))
        return module.to(dtype).train(training)

    def run(self, module: nn.Module, batch: Batch, seed: int = 0) -> Output:
        """Call the module with fixed random numbers."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return self.forward(module, batch)

    def capacity(self, tokens: int) -> int:
        """Return the declared capacity of an expert in training."""
        raise NotImplementedError

    def gate_weight(self, module: nn.Module) -> Tensor | None:
        """Return the `[E, H]` weight of a linear gate, if the layer has one."""
        return None

    def gate_bias(self, module: nn.Module) -> Tensor | None:
        """Return what a linear gate adds to its logits, `[E]`; None: nothing."""
        return None

    def gate(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the gate's parameters that learn."""
        weight = self.gate_weight(module)
        return [weight] if isinstance(weight, nn.Parameter) and weight.requires_grad else []

    def expert(self, module: nn.Module, index: int, x: Tensor) -> Tensor | None:
        """Apply one expert to all tokens, `[N, H] -> [N, H]`, without weights."""
        return None

    def join(self, module: nn.Module, x: Tensor, experts: Tensor) -> Tensor:
        """Return the layer's output of the experts' weighted sum: adds a shared expert, if there is one. `[N, H]` all."""
        return experts

    def odd(self) -> Layer | None:
        """Return the layer with odd widths; None: they are fixed."""
        return None

    def routing(self, output: Output) -> Routing:
        """Return the routing of an output."""
        if output.routing is None:
            raise NotApplicable("the layer does not return its routing")
        return output.routing

    def weighted_sum(self, module: nn.Module, x: Tensor, routing: Routing) -> Tensor:
        """Apply the experts one by one; a dropped assignment adds nothing. `[N, H] -> [N, H]`."""
        y = torch.zeros_like(x)
        for index in range(self.num_experts):
            alone = self.expert(module, index, x)
            if alone is None:
                raise NotApplicable("the layer does not give one expert alone")
            weight = torch.where(routing.kept & (routing.expert == index), routing.weight, 0).sum(dim=1, keepdim=True)
            y = y + weight * alone
        return self.join(module, x, y)


def require_choice(layer: Layer) -> None:
    """Check that the layer chooses among experts."""
    if layer.top_k >= layer.num_experts:
        raise NotApplicable("every token takes every expert")


def scores_for(experts: Tensor, num_experts: int, top: float, gap: float) -> Tensor:
    """Return logits whose k largest are the choices `experts`, `[N, k] -> [N, E]`: `top`, `top - gap`, ..., the rest below."""
    top_k = experts.shape[1]
    logits = torch.full((len(experts), num_experts), top - (top_k + 1) * gap, dtype=torch.float64)
    return logits.scatter_(1, experts, top - gap * torch.arange(top_k, dtype=torch.float64).expand_as(experts))


def batch_of_logits(layer: Layer, module: nn.Module, logits: Tensor, sequences: int = 1) -> Batch:
    """Return a batch for which a linear gate computes `logits`, `[N, E]`; other directions of its tokens are random."""
    weight = layer.gate_weight(module)
    if weight is None:
        raise NotApplicable("the router has no linear gate")
    weight = weight.detach().double().cpu()
    if weight.shape[0] > weight.shape[1]:
        raise NotApplicable("the gate has more experts than inputs: logits cannot be chosen")
    if (bias := layer.gate_bias(module)) is not None:
        logits = logits - bias.detach().double().cpu()
    inverse = torch.linalg.pinv(weight)  # [H, E]
    free = Batch.random(layer, 1, len(logits)).x[0]
    x = logits @ inverse.T + (free - free @ weight.T @ inverse.T)
    batch = Batch.random(layer, sequences, len(logits) // sequences)
    return replace(batch, x=x.view_as(batch.x).to(next(module.parameters()).dtype))


def batch_of_choices(layer: Layer, module: nn.Module, experts: Tensor) -> Batch:
    """Return a batch whose tokens choose `experts`, `[N, k]`, in this order, by logits far apart."""
    return batch_of_logits(layer, module, scores_for(experts, layer.num_experts, 5.0, 10.0))


def collapsed(layer: Layer, module: nn.Module, tokens: int) -> Batch:
    """Return a batch whose tokens all choose the first k experts."""
    return batch_of_choices(layer, module, torch.arange(layer.top_k).expand(tokens, -1))


def require_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """Check two tensors. Returns the norm of the difference over that of `expected`."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-9)) if actual.numel() else 0.0
    if not error <= tolerance:
        raise Failed(f"{what}: relative error {error:.1e}, above {tolerance:.0e}")
    return error


def trained(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that get a gradient."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def gradients(tensors: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each tensor; zeros where there is none."""
    if not loss.requires_grad or not tensors:
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    inputs = list(tensors.values())
    grads = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(tensors, grads, strict=True))
