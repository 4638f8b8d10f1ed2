"""Training: gradients, the state that a checkpoint holds and `forward` does not write, and the balance of the load."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from nlgmoe.tools.check.layer import (
    Batch,
    Failed,
    Layer,
    NotApplicable,
    Output,
    batch_of_logits,
    gradients,
    require_choice,
    trained,
)

# Of the finite differences: some layers compute parts in fp32, others have kinks (ReLU) or choices of their own.
DIFFERENCES = (1e-3, 1e-5)
TOLERANCE = 1e-2
STEPS = 50  # after which the load is balanced


def gradients_are_finite_differences(layer: Layer) -> str:
    """Compare directional derivatives of output plus auxiliary loss, for the input and each parameter.

    A gradient is right if it is that of one of `DIFFERENCES`: one is small enough to cross no kink, one large enough for fp32.
    """
    module, errors = layer.make(), []
    batch = _separated(layer, module).tracked()
    probe = torch.randn(batch.x.shape, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float64)

    def value() -> tuple[Tensor, Output]:
        output = layer.run(module, batch)
        return (output.y * probe).sum() + (0 if output.aux is None else output.aux), output

    loss, base = value()
    named, without = {"the input": batch.x, **trained(module)}, ""
    if layer.estimated_gradient:
        gate = {id(parameter) for parameter in layer.gate(module)} | {id(batch.x)}
        named = {name: value for name, value in named.items() if id(value) not in gate}
        without = "; not of input and gate, whose gradients are declared an estimate"
    generator = torch.Generator("cpu").manual_seed(2)
    for name, gradient in gradients(named, loss).items():
        tensor = named[name]
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        actual = float((gradient * direction).sum())
        differences = []
        for step in DIFFERENCES:
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


def _separated(layer: Layer, module: nn.Module) -> Batch:
    """Return a batch whose logits are far apart, so that a small step changes no choice."""
    generator = torch.Generator("cpu").manual_seed(3)
    ranks = torch.rand(24, layer.num_experts, generator=generator).argsort(dim=1).double()
    with suppress(NotApplicable):
        return batch_of_logits(layer, module, ranks * 0.4 - 1, sequences=2)
    return Batch.random(layer, 2, 12)


def _choices_differ(one: Output, other: Output) -> bool:
    if one.routing is None or other.routing is None:
        return False
    pairs = (one.routing.expert, other.routing.expert), (one.routing.kept, other.routing.kept)
    return not all(torch.equal(*pair) for pair in pairs)


def _gate_and_output(layer: Layer) -> tuple[dict[str, Tensor], Output]:
    require_choice(layer)
    module = layer.make()
    gate = {id(parameter) for parameter in layer.gate(module)}
    if not gate:
        raise NotApplicable("the router has no parameter that learns")
    named = {name: parameter for name, parameter in trained(module).items() if id(parameter) in gate}
    return named, layer.run(module, _separated(layer, module))


def _norms(loss: Tensor, named: dict[str, Tensor]) -> dict[str, float]:
    norms = {name: float(gradient.norm()) for name, gradient in gradients(named, loss).items()}
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


def auxiliary_loss_reaches_the_gate(layer: Layer) -> str:
    """Check that the auxiliary loss has a gradient in the gate, and so has each loss that the router adds."""
    gate, output = _gate_and_output(layer)
    if output.aux is None:
        raise NotApplicable("the layer has no auxiliary loss")
    losses = {} if output.routing is None else output.routing.losses
    for name, loss in {"the auxiliary loss": output.aux, **losses}.items():
        if float(loss.detach().abs()) > 0 and max(_norms(loss, gate).values()) < 1e-9:
            raise Failed(f"{name} is {float(loss.detach()):.4g}, and has no gradient in the gate")
    if float(output.aux.detach()) == 0:
        raise NotApplicable("the auxiliary loss is 0")
    return f"of the auxiliary loss {max(_norms(output.aux, gate).values()):.2g}"


def forward_writes_no_state(layer: Layer) -> str:
    """Check that `forward` changes no parameter or buffer, and gives equal results twice, as activation checkpointing needs."""
    for training in (True, False):
        module, batch = layer.make(training=training), replace(Batch.random(layer, 2, 16), noise_key=(0, 0, 0))
        before, mode = _state(module), "training" if training else "evaluation"
        with torch.no_grad():
            first = layer.run(module, batch)
            second = layer.run(module, batch, seed=int(layer.takes_key))  # of the global generator
        if different := _differences(before, _state(module)):
            raise Failed(f"forward in {mode} has changed {different[0]}")
        if not torch.equal(first.y, second.y):
            raise Failed(f"the same input and random numbers give another output the second time, in {mode}")
    return "two forward passes, in training and in evaluation"


def _state(module: nn.Module) -> dict[str, Tensor]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach().clone() for name, value in tensors}


def _differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def steps_follow_the_requests(layer: Layer) -> str:
    """Check that `after_step` depends on requests and buffers alone, and survives a step without tokens.

    A load that `forward` has kept is that of one micro-batch of one rank; the module's dtype may not count to 257.
    """
    counted, routings = layer.make(torch.float32), []
    for size in (8, 0):
        with torch.no_grad():
            routing = layer.run(counted, Batch.random(layer, size, 512, 7, torch.float32)).routing
        if routing is None or not layer.after_step(counted, [routing]):
            raise NotApplicable("the layer has no state that steps change")
        routings.append(routing)
    expected: dict[str, Tensor] = {}
    for reason, dtype, seed in (
        ("", torch.float32, 0),
        ("forward's input", torch.float32, 1),
        ("dtype", torch.bfloat16, 0),
    ):
        module = layer.make(dtype)
        layer.run(module, Batch.random(layer, 2, 16, seed, dtype))
        for routing in reversed(routings):
            layer.after_step(module, [routing])
            if wrong := [name for name, value in module.named_buffers() if not bool(value.isfinite().all())]:
                raise Failed(f"{wrong[0]} is not finite after a step of {len(routing.expert)} tokens")
        buffers = dict(module.named_buffers())
        expected = expected or buffers
        if different := _differences(buffers, expected):
            raise Failed(f"{different[0]} after the same requests depends on {reason}")
    return f"{len(expected)} buffers"


class Training:
    """A few steps of Adam towards a fixed map of random data, in fp32."""

    def __init__(self, layer: Layer, module: nn.Module) -> None:
        self.layer, self.module = layer, module
        self.optimizer = torch.optim.Adam(trained(module).values(), lr=1e-2)

    def steps(self, numbers: range, batch: Batch | None = None, task: bool = True) -> bool:
        """Take some steps; without `task` with the balancing losses alone. Returns False if the layer has no `after_step`."""
        learns = False
        for number in numbers:
            data = batch or Batch.random(self.layer, 4, 32, seed=number, dtype=torch.float32)
            output = self.layer.run(self.module, data, seed=number)
            loss = output.y.new_zeros(()) if output.aux is None else output.aux
            if task:
                loss = loss + (output.y - data.x.roll(1, -1).tanh()).square().mean()
            elif output.other is not None:
                loss = loss - output.other
            self.optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
                self.optimizer.step()
            learns = self.layer.after_step(self.module, [] if output.routing is None else [output.routing])
        return learns


def a_resumed_run_is_the_same(layer: Layer) -> str:
    """Compare five steps with three, a save, a load into a new module, and two more."""
    whole, resumed = (Training(layer, layer.make(torch.float32, seed=seed)) for seed in (0, 9))
    whole.steps(range(3))
    file = io.BytesIO()
    torch.save([whole.module.state_dict(), whole.optimizer.state_dict()], file)
    file.seek(0)
    model, optimizer = torch.load(file)
    resumed.module.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    probe, outputs = Batch.random(layer, 2, 16, dtype=torch.float32), []
    for run in (whole, resumed):
        run.steps(range(3, 5))
        with torch.no_grad():
            outputs.append(layer.run(run.module.eval(), probe).y)
    if different := _differences(_state(whole.module), _state(resumed.module)):
        raise Failed(f"{', '.join(different[:3])} differ after a resumed run: state outside of state_dict()")
    if not torch.equal(*outputs):
        raise Failed("outputs differ after a resumed run: state outside of state_dict()")
    return f"{len(_state(whole.module))} tensors, {len(list(whole.module.buffers()))} of them buffers"


def _load(layer: Layer, module: nn.Module, batch: Batch) -> Tensor:
    """Return the requests of each expert, `[E]`."""
    with torch.no_grad():
        routing = layer.routing(layer.run(module, batch))
    return torch.bincount(routing.expert.flatten(), minlength=layer.num_experts)


def no_expert_is_dead(layer: Layer) -> str:
    """Check that every expert is chosen by some of 1024 tokens after 50 steps."""
    run = Training(layer, layer.make(torch.float32))
    run.steps(range(STEPS))
    load = _load(layer, run.module, Batch.random(layer, 8, 128, seed=99, dtype=torch.float32))
    if dead := (load == 0).nonzero().flatten().tolist():
        raise Failed(f"experts {dead} are chosen by no token after {STEPS} steps")
    return f"the least of {layer.num_experts} experts has {float(load.min() / load.sum()):.1%} of the requests"


def balancing_lowers_imbalance(layer: Layer) -> str:
    """Check that 50 steps of the auxiliary loss, or of a bias, spread the load of a batch that prefers one expert."""
    require_choice(layer)
    module = layer.make(torch.float32)
    weight = layer.gate_weight(module)
    if weight is None:
        raise NotApplicable("the router has no linear gate")
    batch = Batch.random(layer, 8, 64, dtype=torch.float32)
    towards = weight.detach()[0] / weight.detach()[0].square().sum()
    batch = replace(batch, x=batch.x + 1.5 * towards)  # raises the first logit by 1.5
    before = _load(layer, module, batch).double()
    with torch.no_grad():
        output = layer.run(module, batch)
    learns = Training(layer, module).steps(range(STEPS), batch, task=False)
    if not learns and not layer.gate(module):
        raise NotApplicable("the gate does not learn")
    if not learns:
        _ = output.balance  # raises NotApplicable where it is absent
    after = _load(layer, module, batch).double()
    first, last = (float(load.std(correction=0) / load.mean()) for load in (before, after))
    if not last < first:
        raise Failed(f"the variation of the load goes from {first:.3g} to {last:.3g}")
    return f"the variation of the load goes from {first:.2f} to {last:.2f}"
