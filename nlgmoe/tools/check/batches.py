"""Batches: neighbours, order, odd sizes, and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from nlgmoe.tools.check.layer import Batch, Failed, Layer, NotApplicable, everyone_to, gradients, require_close
from nlgmoe.tools.check.state import Training


def _reads_positions(layer: Layer) -> bool:
    """Return True if other positions of the same tokens change the output."""
    module, batch = layer.make(training=False), Batch.random(layer, 2, 12)
    with torch.no_grad():
        here = layer.run(module, batch).y
        there = layer.run(module, replace(batch, first_position=5)).y
    return not torch.equal(here, there)


def evaluation_does_not_see_neighbours(layer: Layer) -> str:
    """Compare a sequence alone with the same in batches, of which one crowds its experts."""
    if layer.drops_in_evaluation:
        raise NotApplicable("the layer is set to drop tokens in evaluation")
    module = layer.make(training=False)
    batch = Batch.random(layer, 4, 12)
    crowd = replace(batch, x=batch.x[:1].expand_as(batch.x), tokens=batch.tokens[:1].expand_as(batch.tokens))
    with torch.no_grad():
        alone = layer.run(module, batch.sequences(slice(0, 1))).y
        for neighbours, name in ((batch, "others"), (crowd, "copies of itself")):
            for place in (0, 3):
                order = [1, 2, 3]
                order.insert(place, 0)
                mixed = replace(neighbours, x=neighbours.x[order], tokens=neighbours.tokens[order])
                y = layer.run(module, mixed, seed=1).y[place : place + 1]
                require_close(f"a sequence among {name}, against alone", y, alone, 1e-5)
    return "alone, among 3 others and 3 copies"


def evaluation_chooses_as_training_does(layer: Layer) -> str:
    """Compare the experts that tokens ask for in training and in evaluation, after five steps, which move a bias."""
    run = Training(layer, layer.make(torch.float32))
    for number in range(5):
        run.step(number)
    batch, found = Batch.random(layer, 4, 32, seed=9, dtype=torch.float32), []
    with torch.no_grad():
        for training, seed in ((True, 0), (True, 1), (False, 0)):
            found.append(layer.routing(layer.run(run.module.train(training), batch, seed)).expert)
    if not torch.equal(found[0], found[1]):
        raise NotApplicable("the choice is random in training")
    if different := int((found[0] != found[2]).any(dim=1).sum()):
        raise Failed(f"{different} of {len(found[0])} tokens ask for other experts in evaluation")
    return f"{len(found[0])} tokens, after five steps"


def permuted_tokens_give_permuted_outputs(layer: Layer) -> str:
    """Check that a dropless layer works token by token."""
    if layer.drops_in_evaluation:
        raise NotApplicable("the layer is set to drop tokens in evaluation")
    if _reads_positions(layer):
        raise NotApplicable("the router reads positions")
    module, batch = layer.make(training=False), Batch.random(layer, 2, 20)
    order = torch.randperm(40, generator=torch.Generator("cpu").manual_seed(1))
    shuffled = replace(
        batch,
        x=batch.x.flatten(0, 1)[order].view_as(batch.x),
        tokens=batch.tokens.flatten()[order].view_as(batch.tokens),
    )
    with torch.no_grad():
        expected = layer.run(module, batch).y.flatten(0, 1)[order]
        actual = layer.run(module, shuffled).y.flatten(0, 1)
    return f"relative error {require_close('permuted tokens', actual, expected, 1e-5):.0e}"


def unusual_sizes_work(layer: Layer) -> str:
    """Check outputs and gradients with empty and overfull experts, one token, no token, odd widths, and zero and large values."""
    module, odd = layer.make(), layer.odd()
    cases: dict[str, Callable[[], tuple[Layer, torch.nn.Module, Batch]]] = {
        "one token": lambda: (layer, module, Batch.random(layer, 1, 1)),
        "0 sequences": lambda: (layer, module, Batch.random(layer, 0, 8)),
        "0 positions": lambda: (layer, module, Batch.random(layer, 2, 0)),
        "37 tokens": lambda: (layer, module, Batch.random(layer, 1, 37)),
        "tokens of zeros": lambda: (layer, module, _scaled(Batch.random(layer, 1, 37), 0)),
        "tokens 1000 times as large": lambda: (layer, module, _scaled(Batch.random(layer, 1, 37), 1000)),
    }
    if layer.gate_weight(module) is not None:
        cases["empty and overfull experts"] = lambda: (layer, module, everyone_to(layer, module, 32))
    if odd is not None:
        cases["odd widths"] = lambda: (odd, odd.make(), Batch.random(odd, 1, 7))
        cases["odd widths in fp32"] = lambda: (odd, odd.make(torch.float32), Batch.random(odd, 1, 7, 0, torch.float32))
    wrong, tried = [], []
    for name, case in cases.items():
        try:
            kind, built, batch = case()
            _finite(kind, built, batch)
            tried.append(name)
        except NotApplicable:
            continue
        except Exception as error:
            reason = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            wrong.append(f"{name}: {' '.join(reason.split())[:120]}")
    if wrong:
        raise Failed("; ".join(wrong))
    return ", ".join(tried)


def _scaled(batch: Batch, factor: float) -> Batch:
    return replace(batch, x=batch.x * factor)


def _finite(layer: Layer, module: torch.nn.Module, batch: Batch) -> None:
    """Check shape, finite output, and finite gradients of one step and of evaluation."""
    for training in (True, False):
        tracked = batch.tracked()
        output = layer.run(module.train(training), tracked)
        if output.y.shape != batch.x.shape:
            raise Failed(f"the output has the shape {list(output.y.shape)}")
        loss = output.y.square().sum() + (0 if output.aux is None else output.aux)
        found = {
            "the output": output.y,
            **{f"the gradient of {name}": g for name, g in gradients(module, loss).items()},
        }
        if output.aux is not None:
            found["the auxiliary loss"] = output.aux
        if wrong := [name for name, one in found.items() if not bool(one.isfinite().all())]:
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
        if not torch.equal(layer.run(module, batch).y, layer.run(module, batch, seed=1).y):
            raise NotApplicable("the layer draws noise in training")
        if layer.drops is None and not torch.allclose(
            torch.cat([layer.run(module, batch.sequences(half)).y for half in halves]), layer.run(module, batch).y
        ):
            raise NotApplicable("outputs depend on the batch, as with a capacity, and the layer declares none")
    whole = gradients(module, layer.run(module, batch).y.square().sum())
    parts = [gradients(module, layer.run(module, batch.sequences(half)).y.square().sum()) for half in halves]
    errors = [require_close(f"gradient of {name}", sum(p[name] for p in parts), whole[name], 1e-5) for name in whole]  # type: ignore[arg-type]
    twice = replace(batch, x=torch.cat([batch.x, batch.x]), tokens=torch.cat([batch.tokens, batch.tokens]))
    one, two = (layer.run(module, each).aux for each in (batch, twice))
    if one is not None and two is not None:
        require_close("the auxiliary loss of two copies of a batch, against one", two, one, 1e-5)
    return f"worst relative error {max(errors):.0e}"
