"""Inputs: neighbours, later tokens, order, sizes, micro-batches, types and devices."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from nlgmoe.device import default_device
from nlgmoe.tools.check.layer import (
    Batch,
    Failed,
    Layer,
    NotApplicable,
    Output,
    collapsed,
    gradients,
    require_close,
    trained,
)
from nlgmoe.tools.check.training import Training


def evaluation_does_not_see_neighbours(layer: Layer) -> str:
    """Compare a sequence alone with the same sequence in batches, among them one of copies, which overfill its experts."""
    if layer.drops_in_evaluation:
        raise NotApplicable("the layer is set to drop tokens in evaluation")
    module, batch = layer.make(training=False), Batch.random(layer, 4, 12)
    with torch.no_grad():
        alone = layer.run(module, batch[[0]]).y
        for order, name in (([0, 1, 2, 3], "others"), ([1, 2, 3, 0], "others"), ([0, 0, 0, 0], "copies of itself")):
            y = layer.run(module, batch[order], seed=1).y
            for place in (place for place, sequence in enumerate(order) if sequence == 0):
                require_close(f"a sequence among {name}, against alone", y[place : place + 1], alone, 1e-5)
    return "alone, among 3 others and 3 copies"


@torch.no_grad()
def sees_no_later_token(layer: Layer) -> str:
    """Change the tokens from some position on, and compare the outputs before it.

    In evaluation and, with the same random numbers, in training; a mode that may drop tokens is left out.
    """
    length, tested, dropping = 48, [], []
    batch, other = (replace(Batch.random(layer, 2, length, seed), noise_key=(0, 0, 0)) for seed in (0, 5))
    for training in (False, True):
        module, mode = layer.make(training=training), "training" if training else "evaluation"
        output = layer.run(module, batch)
        if _may_drop(layer, output, training):
            dropping.append(f"not in {mode}: with a capacity, which tokens are dropped depends on later ones")
            continue
        for place in (1, length // 2, length - 1):
            x, tokens = batch.x.clone(), batch.tokens.clone()
            x[:, place:], tokens[:, place:] = other.x[:, place:], other.tokens[:, place:]
            changed = layer.run(module, replace(batch, x=x, tokens=tokens)).y
            require_close(f"outputs before changed tokens, in {mode}", changed[:, :place], output.y[:, :place], 1e-9)
        tested.append(f"in {mode}")
    if not tested:
        raise NotApplicable("with a capacity, which tokens are dropped depends on later ones")
    return "; ".join([f"{length} tokens, {' and '.join(tested)}", *dropping])


def _may_drop(layer: Layer, output: Output, training: bool) -> bool:
    """Return True if experts have a capacity, or may have one that the layer does not declare."""
    if not training:
        return layer.drops_in_evaluation
    if layer.drops is not None:
        return layer.drops
    routing = output.routing
    return routing is None or routing.capacity is not None or not bool(routing.kept.all())


def permuted_tokens_give_permuted_outputs(layer: Layer) -> str:
    """Check that a dropless layer works token by token; not applicable if other positions change the output."""
    if layer.drops_in_evaluation:
        raise NotApplicable("the layer is set to drop tokens in evaluation")
    module, batch = layer.make(training=False), Batch.random(layer, 2, 20)
    order = torch.randperm(40, generator=torch.Generator("cpu").manual_seed(1))
    x, tokens = (value.flatten(0, 1)[order].view_as(value) for value in (batch.x, batch.tokens))
    with torch.no_grad():
        expected = layer.run(module, batch).y
        if not torch.equal(expected, layer.run(module, replace(batch, first_position=5)).y):
            raise NotApplicable("the router reads positions")
        actual = layer.run(module, replace(batch, x=x, tokens=tokens)).y.flatten(0, 1)
    error = require_close("outputs of permuted tokens", actual, expected.flatten(0, 1)[order], 1e-5)
    return f"permuted tokens: relative error {error:.0e}"


def evaluation_chooses_as_training_does(layer: Layer) -> str:
    """Compare the experts that tokens choose in training and in evaluation, after five steps, which move a bias."""
    run = Training(layer, layer.make(torch.float32))
    run.steps(range(5))
    batch, choices = Batch.random(layer, 4, 32, seed=9, dtype=torch.float32), []
    with torch.no_grad():
        for training, seed in ((True, 0), (True, 1), (False, 0)):
            choices.append(layer.routing(layer.run(run.module.train(training), batch, seed)).expert)
    if not torch.equal(choices[0], choices[1]):
        raise NotApplicable("the choice is random in training")
    if different := int((choices[0] != choices[2]).any(dim=1).sum()):
        raise Failed(f"{different} of {len(choices[0])} tokens choose other experts in evaluation")
    return f"{len(choices[0])} tokens, after five steps"


def unusual_sizes_work(layer: Layer) -> str:
    """Check outputs and gradients with empty and overfull experts, one token, no token, odd widths, and zero and large values."""
    module, odd, tokens = layer.make(), layer.odd(), Batch.random(layer, 1, 37)
    cases: dict[str, Callable[[], tuple[Layer, nn.Module, Batch]]] = {
        "one token": lambda: (layer, module, Batch.random(layer, 1, 1)),
        "0 sequences": lambda: (layer, module, Batch.random(layer, 0, 8)),
        "0 positions": lambda: (layer, module, Batch.random(layer, 2, 0)),
        "37 tokens": lambda: (layer, module, tokens),
        "tokens of zeros": lambda: (layer, module, replace(tokens, x=tokens.x * 0)),
        "tokens 1000 times as large": lambda: (layer, module, replace(tokens, x=tokens.x * 1000)),
        "empty and overfull experts": lambda: (layer, module, collapsed(layer, module, 32)),
    }
    if odd is not None:
        for name, dtype in (("odd widths", torch.float64), ("odd widths in fp32", torch.float32)):
            cases[name] = lambda dtype=dtype: (odd, odd.make(dtype), Batch.random(odd, 1, 7, dtype=dtype))  # type: ignore[misc]
    wrong, tried = [], []
    for name, case in cases.items():
        try:
            _require_finite(*case())
            tried.append(name)
        except NotApplicable:
            continue
        except Exception as error:
            reason = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            wrong.append(f"{name}: {' '.join(reason.split())[:120]}")
    if wrong:
        raise Failed("; ".join(wrong))
    return ", ".join(tried)


def _require_finite(layer: Layer, module: nn.Module, batch: Batch) -> None:
    """Check shape, finite output, and finite gradients of one step and of evaluation."""
    for training in (True, False):
        output = layer.run(module.train(training), batch.tracked())
        if output.y.shape != batch.x.shape:
            raise Failed(f"the output has the shape {list(output.y.shape)}")
        values = {"the output": output.y}
        values |= {f"the gradient of {name}": value for name, value in gradients(trained(module), output.loss).items()}
        if output.aux is not None:
            values["the auxiliary loss"] = output.aux
        if wrong := [name for name, value in values.items() if not bool(value.isfinite().all())]:
            raise Failed(f"{wrong[0]} is not finite")
        with torch.no_grad():
            again = layer.run(module, batch)
        require_close("the output without gradients", again.y, output.y, 1e-4)
    module.train()


def micro_batches_add_up(layer: Layer) -> str:
    """Check that, without a capacity, gradients of two micro-batches add up, and that two copies have the loss of one."""
    if layer.drops:
        raise NotApplicable("capacity is that of a micro-batch")
    module, batch, halves = layer.make(), Batch.random(layer, 4, 12), (slice(0, 2), slice(2, 4))
    with torch.no_grad():
        y = layer.run(module, batch).y
        if not torch.equal(y, layer.run(module, batch, seed=1).y):
            raise NotApplicable("the layer draws noise in training")
        parts = torch.cat([layer.run(module, batch[half]).y for half in halves])
        if layer.drops is None and not torch.allclose(parts, y):
            raise NotApplicable("outputs depend on the batch, as with a capacity, and the layer declares none")

    def grads(batch: Batch) -> dict[str, torch.Tensor]:
        return gradients(trained(module), layer.run(module, batch).y.square().sum())

    whole, (first, second) = grads(batch), (grads(batch[half]) for half in halves)
    added = {name: first[name] + second[name] for name in whole}
    errors = [require_close(f"gradient of {name}", added[name], value, 1e-5) for name, value in whole.items()]
    one, two = (layer.run(module, batch[order]).aux for order in ([0, 1, 2, 3], [0, 1, 2, 3] * 2))
    if one is not None and two is not None:
        require_close("the auxiliary loss of two copies of a batch, against one", two, one, 1e-5)
    return f"worst relative error {max(errors):.0e}"


def half_precision_is_close(layer: Layer) -> str:
    """Compare outputs in bf16 and fp16 with those in fp32."""

    def output(dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():
            return layer.run(layer.make(dtype, training=False), Batch.random(layer, 4, 16, dtype=dtype)).y

    expected, errors = output(torch.float32), []
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 5e-3)):
        name, y = str(dtype).removeprefix("torch."), output(dtype)
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


def types_do_not_leak(layer: Layer) -> str:
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


def host_reads_nothing(layer: Layer) -> str:
    """Run forward, backward and `after_step` on fake tensors, which have no values: reading one is an error.

    They are on a CPU, because PyTorch has no autocast for `meta`. A layer of the user's may read values in a branch for CPUs:
    that fails only if it reads on `meta` too.
    """
    for training in (True, False):
        place = _place_of_read(layer, training, "cpu")
        if place and type(layer).without_dispatch is Layer.without_dispatch:
            place = _place_of_read(layer, training, "meta")
        if place:
            raise Failed(f"the host reads the device ({place})")
    return "forward and backward, on tensors without values"


def _place_of_read(layer: Layer, training: bool, device: str) -> str:
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
            if training:
                layer.after_step(module, [] if output.routing is None else [output.routing])
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
        place = f"{frames[-1].filename.rpartition('/')[2]}, line {frames[-1].lineno}: {frames[-1].line}"
        if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            return place
        raise NotApplicable(f"the layer does not run without values ({place}: {str(error)[:100]})") from None
    return ""


def gpu_agrees_with_cpu(layer: Layer) -> str:
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
