"""State that a checkpoint holds and `forward` does not write; and the balance of the load over fifty steps."""

from __future__ import annotations

import io
from dataclasses import replace

import torch
from torch import Tensor, nn

from nlgmoe.tools.check.layer import Batch, Failed, Layer, NotApplicable, Target, require_choice

STEPS = 50


def forward_writes_no_state(layer: Target) -> str:
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
        ("", torch.float32, 0), ("forward's input", torch.float32, 1), ("dtype", torch.bfloat16, 0)
    ):  # fmt: skip
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

    def __init__(self, layer: Target, module: nn.Module) -> None:
        self.layer, self.module = layer, module
        self.optimizer = torch.optim.Adam([value for value in module.parameters() if value.requires_grad], lr=1e-2)

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


def a_resumed_run_is_the_same(layer: Target) -> str:
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
    first, last = (
        float(load.std(correction=0) / load.mean()) for load in (before, _load(layer, module, batch).double())
    )
    if not last < first:
        raise Failed(f"the variation of the load goes from {first:.3g} to {last:.3g}")
    return f"the variation of the load goes from {first:.2f} to {last:.2f}"
