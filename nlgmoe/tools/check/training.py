"""Fifty steps on random data: no expert dies, and balancing balances."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from nlgmoe.tools.check.layer import Batch, Failed, Layer, NotApplicable, require_choice
from nlgmoe.tools.check.state import Training

STEPS = 50


def _load(layer: Layer, module: nn.Module, batch: Batch) -> Tensor:
    """Return the requests of each expert, `[E]`."""
    with torch.no_grad():
        routing = layer.routing(layer.run(module, batch))
    return torch.bincount(routing.expert.flatten(), minlength=layer.num_experts)


def no_expert_is_dead(layer: Layer) -> str:
    """Check that every expert is asked for by some of 1024 tokens after 50 steps."""
    run = Training(layer, layer.make(torch.float32))
    for number in range(STEPS):
        run.step(number)
    load = _load(layer, run.module, Batch.random(layer, 8, 128, seed=99, dtype=torch.float32))
    if dead := (load == 0).nonzero().flatten().tolist():
        raise Failed(f"experts {dead} are asked for by no token after {STEPS} steps")
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
    before = _variation(_load(layer, module, batch))
    with torch.no_grad():
        output = layer.run(module, batch)
    run, learns = Training(layer, module), False
    for number in range(STEPS):
        learns = run.step(number, batch, task=False)
    if not learns and not layer.gate(module):
        raise NotApplicable("the gate does not learn")
    if not learns:
        _ = output.balance  # raises NotApplicable where there is none
    after = _variation(_load(layer, module, batch))
    if not after < before:
        raise Failed(f"the variation of the load goes from {before:.3g} to {after:.3g}")
    return f"the variation of the load goes from {before:.2f} to {after:.2f}"


def _variation(load: Tensor) -> float:
    return float(load.double().std(correction=0) / load.double().mean())
