"""Gradients: equal to finite differences, and present where they must be."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nlgmoe.tools.check.layer import (
    Batch,
    Failed,
    Layer,
    NotApplicable,
    Output,
    Target,
    batch_of_logits,
    require_choice,
)  # fmt: skip

# Of the finite differences: some layers compute parts in fp32, others have kinks (ReLU) or choices of their own.
STEPS = (1e-3, 1e-5)
TOLERANCE = 1e-2
PAPER_LOSSES = frozenset({"balance_loss", "z_loss", "distillation_loss"})  # logged as `train/NAME`


def gradients_are_finite_differences(layer: Target) -> str:
    """Compare directional derivatives of output plus auxiliary loss, for the input and each parameter.

    A gradient is right if it is that of one of `STEPS`: one is small enough to cross no kink, one large enough for fp32.
    """
    module, errors = layer.make(), []
    batch = _separated(layer, module).tracked()
    probe = torch.randn(batch.x.shape, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float64)

    def value() -> tuple[Tensor, Output]:
        output = layer.run(module, batch)
        return (output.y * probe).sum() + (0 if output.aux is None else output.aux), output

    loss, base = value()
    named: dict[str, Tensor] = {"the input": batch.x}
    named |= {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    without = ""
    if isinstance(layer, Layer) and layer.estimated_gradient:
        gate = {id(parameter) for parameter in layer.gate(module)} | {id(batch.x)}
        named = {name: value for name, value in named.items() if id(value) not in gate}
        without = "; not of input and gate, whose gradients are declared an estimate"
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    generator = torch.Generator("cpu").manual_seed(2)
    for (name, tensor), gradient in zip(named.items(), grads, strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        actual = float((gradient * direction).sum())
        differences = []
        for step in STEPS:
            sides = _values_beside(tensor, step * direction, value)
            if any(_choices_differ(base, side) for _, side in sides):
                continue  # the loss jumps where a choice changes
            expected = float(sides[0][0] - sides[1][0]) / (2 * step)
            error = abs(actual - expected) / max(abs(expected), 1e-2 * abs(float(loss.detach())), 1e-2)
            differences.append((math.inf if math.isnan(error) else error, expected))
        if not differences:
            continue
        error, expected = min(differences)
        errors.append(error)
        if error > TOLERANCE:
            raise Failed(f"gradient of {name}: {actual:.4g} along a direction, finite differences {expected:.4g}")
    if not errors:
        raise NotApplicable("every step changes a choice")
    return f"{len(errors)} of {len(named)} tensors, worst relative error {max(errors):.0e}{without}"


@torch.no_grad()
def _values_beside(
    tensor: Tensor, change: Tensor, value: Callable[[], tuple[Tensor, Output]]
) -> list[tuple[Tensor, Output]]:
    """Evaluate `value` with `change` added to a tensor, and subtracted from it."""
    original, values = tensor.detach().clone(), []
    for sign in (1, -1):
        tensor.copy_(original + sign * change)
        values.append(value())
    tensor.copy_(original)
    return values


def _separated(layer: Target, module: nn.Module, tokens: int = 24) -> Batch:
    """Return a batch whose logits are far apart, so that a small step changes no choice."""
    if not isinstance(layer, Layer):
        return Batch.random(layer, 2, tokens // 2)
    generator = torch.Generator("cpu").manual_seed(3)
    ranks = torch.rand(tokens, layer.num_experts, generator=generator).argsort(dim=1).double()
    try:
        return batch_of_logits(layer, module, ranks * 0.4 - 1, sequences=2)
    except NotApplicable:
        return Batch.random(layer, 2, tokens // 2)


def _choices_differ(one: Output, other: Output) -> bool:
    if one.routing is None or other.routing is None:
        return False
    same = torch.equal(one.routing.expert, other.routing.expert) and torch.equal(one.routing.kept, other.routing.kept)
    return not same


def _gate_and_output(layer: Layer) -> tuple[dict[str, nn.Parameter], Output]:
    """Return the gate's parameters by name, and the output of a training batch."""
    require_choice(layer)
    module = layer.make()
    gate = {id(parameter) for parameter in layer.gate(module)}
    if not gate:
        raise NotApplicable("the router has no parameter that learns")
    named = {name: parameter for name, parameter in module.named_parameters() if id(parameter) in gate}
    return named, layer.run(module, _separated(layer, module))


def _norms(loss: Tensor, named: dict[str, nn.Parameter]) -> dict[str, float]:
    if not loss.requires_grad:
        return dict.fromkeys(named, 0.0)
    grads = torch.autograd.grad(
        loss, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    norms = {name: float(gradient.norm()) for name, gradient in zip(named, grads, strict=True)}
    if any(map(math.isnan, norms.values())):
        raise Failed("the gradient in the gate is NaN")
    return norms


def output_reaches_the_gate(layer: Layer) -> str:
    """Check that the loss of the output has a gradient in the gate, and with the auxiliary loss in each of its parameters."""
    gate, output = _gate_and_output(layer)
    norm = max(_norms(output.y.square().sum(), gate).values())
    if norm < 1e-6:
        raise Failed("the output has no gradient in the gate: a constant or detached weight")
    if idle := [name for name, norm in _norms(output.loss, gate).items() if norm < 1e-9]:
        raise Failed(f"{', '.join(idle)}: a parameter that gets no gradient of the output or the auxiliary loss")
    return f"gradient norm of the output's loss in the gate {norm:.2g}"


def own_losses_are_named_scalars(layer: Layer) -> str:
    """Check that each loss that the router adds has no dimension, and a name of its own, under which it is logged."""
    module = layer.make()
    losses = layer.routing(layer.run(module, _separated(layer, module))).losses
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.ndim > 0:
            raise Failed(f"loss {name} is no tensor without dimensions; return a mean over tokens")
        if not name.endswith("_loss") or name in PAPER_LOSSES:
            raise Failed(f"loss {name} needs a name of its own that ends with _loss; rename it")
    if not losses:
        raise NotApplicable("the router adds no loss")
    return f"the router adds {', '.join(losses)}"


def auxiliary_loss_reaches_the_gate(layer: Layer) -> str:
    """Check that the auxiliary loss has a gradient in the gate, and so has each loss that the router adds."""
    gate, output = _gate_and_output(layer)
    if output.aux is None:
        raise NotApplicable("the layer has no auxiliary loss")
    losses = {} if output.routing is None else output.routing.losses
    for name, loss in {"the auxiliary loss": output.aux, **losses}.items():
        if loss.ndim > 0:
            continue  # `own_losses_are_named_scalars` refuses it
        if float(loss.detach().abs()) > 0 and max(_norms(loss, gate).values()) < 1e-9:
            raise Failed(f"{name} is {float(loss.detach()):.4g}, and has no gradient in the gate")
    if float(output.aux.detach()) == 0:
        raise NotApplicable("the auxiliary loss is 0")
    return f"of the auxiliary loss {max(_norms(output.aux, gate).values()):.2g}"
