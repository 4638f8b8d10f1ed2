"""State and types: what a checkpoint must hold, what `forward` must not write, and the precisions."""

from __future__ import annotations

import io
from dataclasses import replace

import torch
from torch import Tensor, nn

from nlgmoe.tools.check.layer import Batch, Failed, Layer, NotApplicable


def forward_writes_no_state(layer: Layer) -> str:
    """Check that `forward` changes no parameter or buffer, and repeats itself, as activation checkpointing needs."""
    for training in (True, False):
        module, batch = layer.make(training=training), replace(Batch.random(layer, 2, 16), noise_key=(0, 0, 0))
        before = _state(module)
        with torch.no_grad():
            first = layer.run(module, batch)
            second = layer.run(module, batch, seed=int(layer.takes_key))  # of the global generator
        mode = "training" if training else "evaluation"
        for name, value in _state(module).items():
            if not torch.equal(value, before[name]):
                raise Failed(f"forward in {mode} has changed {name}")
        if not torch.equal(first.y, second.y):
            raise Failed(f"the same input and random numbers give another output the second time, in {mode}")
    return "two forward passes, in training and in evaluation"


def _state(module: nn.Module) -> dict[str, Tensor]:
    found = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach().clone() for name, value in found}


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
    ends: dict[str, dict[str, Tensor]] = {}
    for what, dtype, seed in (
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
        ends[what] = dict(module.named_buffers())
        if different := [name for name, value in ends[what].items() if not torch.equal(value, ends[""][name])]:
            raise Failed(f"{different[0]} after the same requests depends on {what}")
    return f"{len(ends[''])} buffers"


class Training:
    """A few steps of Adam towards a fixed map of random data."""

    def __init__(self, layer: Layer, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.layer, self.module, self.dtype = layer, module, dtype
        self.optimizer = torch.optim.Adam([one for one in module.parameters() if one.requires_grad], lr=1e-2)

    def step(self, number: int, batch: Batch | None = None, task: bool = True) -> bool:
        """Take one step. Returns False if the layer has nothing to do after it."""
        if batch is None:
            batch = Batch.random(self.layer, 4, 32, seed=number, dtype=self.dtype)
        output = self.layer.run(self.module, batch, seed=number)
        loss = output.y.new_zeros(()) if output.aux is None else output.aux
        if not task and output.other is not None:
            loss = loss - output.other
        if task:
            loss = loss + (output.y - batch.x.roll(1, -1).tanh()).square().mean()
        self.optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
            self.optimizer.step()
        return self.layer.after_step(self.module, [] if output.routing is None else [output.routing])


def a_resumed_run_is_the_same(layer: Layer) -> str:
    """Compare five steps with three, a save, a load into a new module, and two more."""
    whole = Training(layer, layer.make(torch.float32))
    for number in range(3):
        whole.step(number)
    file = io.BytesIO()
    torch.save([whole.module.state_dict(), whole.optimizer.state_dict()], file)
    file.seek(0)
    resumed = Training(layer, layer.make(torch.float32, seed=9))
    model, optimizer = torch.load(file)
    resumed.module.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    for run in (whole, resumed):
        for number in (3, 4):
            run.step(number)
    ends = [_state(run.module) for run in (whole, resumed)]
    if different := [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])]:
        raise Failed(f"{', '.join(different[:3])} differ after a resumed run: state outside of state_dict()")
    probe = Batch.random(layer, 2, 16, dtype=torch.float32)
    with torch.no_grad():
        outputs = [layer.run(run.module.eval(), probe).y for run in (whole, resumed)]
    if not torch.equal(*outputs):
        raise Failed("outputs differ after a resumed run: state outside of state_dict()")
    buffers = len(list(whole.module.buffers()))
    return f"{len(ends[0])} tensors, {buffers} of them buffers"


def half_precision_is_close(layer: Layer) -> str:
    """Compare outputs in bf16 and fp16 with those in fp32."""
    reference = layer.make(torch.float32, training=False)
    batch = Batch.random(layer, 4, 16, dtype=torch.float32)
    with torch.no_grad():
        expected = layer.run(reference, batch)
    found = []
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 5e-3)):
        module = layer.make(dtype, training=False)
        half = Batch.random(layer, 4, 16, dtype=dtype)
        with torch.no_grad():
            output = layer.run(module, half)
        name = str(dtype).removeprefix("torch.")
        if output.y.dtype != dtype:
            raise Failed(f"the output of {name} inputs is {output.y.dtype}")
        if not bool(output.y.isfinite().all()):
            raise Failed(f"the output is not finite in {name}")
        errors = (output.y.float() - expected.y).norm(dim=-1) / expected.y.norm(dim=-1).clamp_min(1e-6)
        # The median: rounding changes a choice here and there.
        if (error := float(errors.median())) > tolerance:
            raise Failed(f"relative error {error:.2g} of a token in {name}, above {tolerance:g}")
        found.append(f"{name} {error:.0e}")
    return f"median relative error: {', '.join(found)}"


def types_do_not_leak(layer: Layer) -> str:
    """Check the types of outputs, gradients, weights and auxiliary loss, with each type and under autocast."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module = layer.make(dtype)
        batch = Batch.random(layer, 2, 16, dtype=dtype).tracked()
        output = layer.run(module, batch)
        if output.y.dtype != dtype:
            raise Failed(f"the output of {dtype} inputs is {output.y.dtype}")
        if output.aux is not None and output.aux.dtype.itemsize < 4:
            raise Failed(f"the auxiliary loss is {output.aux.dtype} with {dtype}: sums over tokens need fp32")
        if output.routing is not None and output.routing.weight.dtype.itemsize < 4:
            raise Failed(f"weights are {output.routing.weight.dtype} with {dtype}: their sums need fp32")
        output.y.float().square().sum().backward()
        assert batch.x.grad is not None
        if batch.x.grad.dtype != dtype:
            raise Failed(f"the gradient of {dtype} inputs is {batch.x.grad.dtype}")
    module = layer.make(torch.float32)
    batch = Batch.random(layer, 2, 16, dtype=torch.float32)
    plain = layer.run(module, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer.run(module, batch)
    routing = mixed.routing
    if routing is not None and routing.weight.dtype.itemsize < 4:
        raise Failed(f"under autocast weights are {routing.weight.dtype}: their sums need fp32")
    if plain.routing is not None and routing is not None:
        same = float((plain.routing.expert == routing.expert).double().mean())
        if same < 1:
            raise Failed(f"autocast changes {1 - same:.0%} of the choices: the gate is not computed in fp32")
    return "fp64, fp32, bf16, and fp32 under autocast to bf16"
