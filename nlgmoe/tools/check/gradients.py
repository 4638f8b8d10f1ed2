"""Gradients: equal to finite differences, and present where they must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from nlgmoe.tools.check.layer import Batch, Failed, Layer, NotApplicable, Output, gradients, require_choice, steered

# Of the finite differences: some layers compute parts in fp32, others have kinks (ReLU) or choices of their own.
STEPS = (1e-3, 1e-5)
TOLERANCE = 1e-2


def gradients_are_finite_differences(layer: Layer) -> str:
    """Compare directional derivatives of output plus auxiliary loss, for the input and each parameter.

    A gradient is right if it is that of one of `STEPS`: one is small enough to cross no kink, one large enough for fp32.
    """
    module, errors = layer.make(), []
    batch = separated(layer, module)
    probe = torch.randn(batch.x.shape, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float64)

    def value(batch: Batch) -> tuple[Tensor, Output]:
        output = layer.run(module, batch)
        return (output.y * probe).sum() + (0 if output.aux is None else output.aux), output

    tracked = batch.tracked()
    loss, base = value(tracked)
    named: dict[str, Tensor] = {"the input": tracked.x}
    named |= {name: one for name, one in module.named_parameters() if one.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    generator = torch.Generator("cpu").manual_seed(2)
    for (name, tensor), gradient in zip(named.items(), found, strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        actual = 0.0 if gradient is None else float((gradient * direction).sum())
        differences = []
        for step in STEPS:
            sides = _values_beside(tensor, step * direction, lambda: value(replace(tracked, x=tracked.x.detach())))
            if any(_choices_differ(base, side) for _, side in sides):
                continue  # the loss jumps where a choice changes
            expected = float(sides[0][0] - sides[1][0]) / (2 * step)
            scale = max(abs(expected), 1e-2 * abs(float(loss.detach())), 1e-2)
            error = abs(actual - expected) / scale
            differences.append((math.inf if math.isnan(error) else error, expected))
        if not differences:
            continue
        error, expected = min(differences)
        errors.append(error)
        if error > TOLERANCE:
            raise Failed(f"gradient of {name}: {actual:.4g} along a direction, finite differences {expected:.4g}")
    if not errors:
        raise NotApplicable("every step changes a choice")
    return f"{len(errors)} of {len(named)} tensors, worst relative error {max(errors):.0e}"


@torch.no_grad()
def _values_beside(
    tensor: Tensor, change: Tensor, value: Callable[[], tuple[Tensor, Output]]
) -> list[tuple[Tensor, Output]]:
    """Evaluate `value` with `change` added to a tensor, and subtracted from it."""
    original, found = tensor.detach().clone(), []
    for sign in (1, -1):
        tensor.copy_(original + sign * change)
        found.append(value())
    tensor.copy_(original)
    return found


def separated(layer: Layer, module: nn.Module, tokens: int = 24) -> Batch:
    """Return a batch whose logits are far apart, so that a small step changes no choice."""
    generator = torch.Generator("cpu").manual_seed(3)
    ranks = torch.rand(tokens, layer.num_experts, generator=generator).argsort(dim=1).double()
    try:
        return steered(layer, module, ranks * 0.4 - 1, sequences=2)
    except NotApplicable:
        return Batch.random(layer, 2, tokens // 2)


def _choices_differ(one: Output, other: Output) -> bool:
    if one.routing is None or other.routing is None:
        return False
    return not (
        torch.equal(one.routing.expert, other.routing.expert) and torch.equal(one.routing.kept, other.routing.kept)
    )


def _gate_of(layer: Layer, module: nn.Module) -> list[nn.Parameter]:
    require_choice(layer)
    if not (gate := layer.gate(module)):
        raise NotApplicable("the router has no parameter that learns")
    return gate


def _norm(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    if not loss.requires_grad:
        return 0.0
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [0.0 if one is None else float(one.norm()) for one in found]
    if any(map(math.isnan, norms)):
        raise Failed("the gradient in the gate is NaN")
    return max(norms)


def output_reaches_the_gate(layer: Layer) -> str:
    """Check that the loss of the output has a gradient in the gate, and with the auxiliary loss in each of its parameters."""
    module = layer.make()
    gate = _gate_of(layer, module)
    output = layer.run(module, separated(layer, module))
    norm = _norm(output.y.square().sum(), gate)
    if norm < 1e-6:
        raise Failed("the output has no gradient in the gate: a constant or detached weight")
    loss = output.y.square().sum() + (0 if output.aux is None else output.aux)
    names = {parameter: name for name, parameter in module.named_parameters()}
    if idle := [names[one] for one in gate if _norm(loss, [one]) < 1e-9]:
        raise Failed(f"{', '.join(idle)}: a parameter that gets no gradient of the output or the auxiliary loss")
    return f"gradient norm {norm:.2g}"


def auxiliary_loss_reaches_the_gate(layer: Layer) -> str:
    """Check that the auxiliary loss has a gradient in the gate, and so has each loss that the router adds."""
    module = layer.make()
    gate = _gate_of(layer, module)
    output = layer.run(module, separated(layer, module))
    aux = output.aux
    if aux is None or float(aux.detach().abs()) == 0:
        raise NotApplicable("the layer has no auxiliary loss" + ("" if aux is None else ", it is 0"))
    norm = _norm(aux, gate)
    if norm < 1e-9:
        raise Failed(f"the auxiliary loss is {float(aux.detach()):.4g}, and has no gradient in the gate")
    losses = {} if output.routing is None else output.routing.losses
    if idle := [name for name, one in losses.items() if float(one.detach().abs()) > 0 and _norm(one, gate) < 1e-9]:
        raise Failed(f"{idle[0]} is {float(losses[idle[0]].detach()):.4g}, and has no gradient in the gate")
    return f"loss {float(aux.detach()):.3g}, gradient norm {norm:.2g}"


def used_experts_get_gradients(layer: Layer) -> str:
    """Check that every expert with a kept token gets a gradient, and one without gets none."""
    module = layer.make()
    output = layer.run(module, Batch.random(layer, 4, 16))
    routing = layer.routing(output)
    norms = expert_norms(layer, module, gradients(module, output.y.square().sum()))
    used = torch.bincount(routing.expert[routing.kept], minlength=layer.num_experts) > 0
    if missing := (used & (norms == 0)).nonzero().flatten().tolist():
        raise Failed(f"experts {missing} computed tokens and got no gradient")
    if extra := (~used & (norms > 0)).nonzero().flatten().tolist():
        raise Failed(f"experts {extra} computed no token and got a gradient")
    return f"{int(used.sum())} of {layer.num_experts} experts were used"


def expert_norms(layer: Layer, module: nn.Module, found: dict[str, Tensor]) -> Tensor:
    """Return the norm of each expert's tensors, `[E]`: rows of stacks `[E, in, out]`, or members of a list of E modules."""
    norms = torch.zeros(layer.num_experts, dtype=torch.float64)
    lists = [name for name, one in module.named_modules() if isinstance(one, nn.ModuleList) and len(one) == len(norms)]
    stacks = 0
    for name, tensor in found.items():
        if tensor.ndim == 3 and len(tensor) == len(norms):
            norms += tensor.double().flatten(1).norm(dim=1)
            stacks += 1
        for prefix in lists:
            if name.startswith(f"{prefix}."):
                norms[int(name[len(prefix) + 1 :].split(".")[0])] += tensor.double().norm()
                stacks += 1
    if not stacks:
        raise NotApplicable("the experts' weights are no stack [E, in, out] and no list of E modules")
    return norms
