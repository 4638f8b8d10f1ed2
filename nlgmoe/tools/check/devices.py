"""Types and devices: half precision, autocast, accelerators."""

from __future__ import annotations

import traceback

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from nlgmoe.device import default_device
from nlgmoe.tools.check.layer import Batch, Failed, NotApplicable, Target, require_close


def half_precision_is_close(layer: Target) -> str:
    """Compare outputs in bf16 and fp16 with those in fp32."""
    with torch.no_grad():
        expected = layer.run(
            layer.make(torch.float32, training=False), Batch.random(layer, 4, 16, dtype=torch.float32)
        ).y
    errors = []
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 5e-3)):
        name = str(dtype).removeprefix("torch.")
        with torch.no_grad():
            y = layer.run(layer.make(dtype, training=False), Batch.random(layer, 4, 16, dtype=dtype)).y
        if y.dtype != dtype:
            raise Failed(f"the output of {name} inputs is {y.dtype}")
        if not bool(y.isfinite().all()):
            raise Failed(f"the output is not finite in {name}")
        relative = (y.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
        # The median: rounding changes a choice here and there.
        if (error := float(relative.median())) > tolerance:
            raise Failed(f"relative error {error:.2g} of a token in {name}, above {tolerance:g}")
        errors.append(f"{name} {error:.0e}")
    return f"median relative error: {', '.join(errors)}"


def types_do_not_leak(layer: Target) -> str:
    """Check the types of outputs, gradients, weights and auxiliary loss, with each type and under autocast."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        batch = Batch.random(layer, 2, 16, dtype=dtype).tracked()
        output = layer.run(layer.make(dtype), batch)
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
    module, batch = layer.make(torch.float32), Batch.random(layer, 2, 16, dtype=torch.float32)
    plain = layer.run(module, batch).routing
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer.run(module, batch).routing
    if plain is None or mixed is None:
        return "fp64, fp32 and bf16"
    if mixed.weight.dtype.itemsize < 4:
        raise Failed(f"under autocast weights are {mixed.weight.dtype}: their sums need fp32")
    if (same := float((plain.expert == mixed.expert).double().mean())) < 1:
        raise Failed(f"autocast changes {1 - same:.0%} of the choices: the gate is not computed in fp32")
    return "fp64, fp32, bf16, and fp32 under autocast to bf16"


def host_reads_nothing(layer: Target) -> str:
    """Run forward, backward and `after_step` on fake tensors, which have no values: reading one is an error.

    They are on a CPU, because PyTorch has no autocast for `meta`. A foreign layer may read values in
    a branch for CPUs: that fails only if it reads on `meta` too.
    """
    for training in (True, False):
        place = _place_of_read(layer, training, "cpu")
        if place and type(layer).without_dispatch is Target.without_dispatch:
            place = _place_of_read(layer, training, "meta")
        if place:
            raise Failed(f"the host reads the device ({place})")
    return "forward and backward, on tensors without values"


def _place_of_read(layer: Target, training: bool, device: str) -> str:
    """Return the line that reads a value; empty: none does."""
    module, mode = layer.make(torch.bfloat16, training), FakeTensorMode(allow_non_fake_inputs=True)
    batch = Batch.random(layer, 2, 16, dtype=torch.bfloat16)
    try:
        layer.run(module, batch)  # a distribution checks its arguments on the host where it is made: once is enough
        fakes = {name: mode.from_tensor(value.to(device)) for name, value in module.state_dict().items()}
        module.load_state_dict(fakes, assign=True)
        with mode:
            output = layer.without_dispatch(module, Batch(batch.x.to(device), batch.tokens.to(device)).tracked())
            output.loss.backward()
            layer.after_step(module, [] if output.routing is None else [output.routing])
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
        place = f"{frames[-1].filename.rpartition('/')[2]}, line {frames[-1].lineno}: {frames[-1].line}"
        if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            return place
        raise NotApplicable(f"the layer does not run without values ({place}: {str(error)[:100]})") from None
    return ""


def gpu_agrees_with_cpu(layer: Target) -> str:
    """Compare output and gradient of the input with those of the CPU, in fp32."""
    device = default_device()
    if device == "cpu":
        raise NotApplicable("no GPU")
    results = []
    for target in ("cpu", device):
        module = layer.make(torch.float32, training=False).to(target)
        batch = Batch.random(layer, 4, 16, dtype=torch.float32)
        batch = Batch(batch.x.to(target), batch.tokens.to(target)).tracked()
        y = layer.run(module, batch).y
        y.square().sum().backward()
        assert batch.x.grad is not None
        results.append((y, batch.x.grad))
    for name, actual, expected in zip(("output", "gradient of the input"), results[1], results[0], strict=True):
        require_close(f"{name} on {device}", actual, expected, 1e-2)
    return f"{device} in fp32"
