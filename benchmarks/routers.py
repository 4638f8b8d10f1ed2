"""Each router of the laboratory beside softmax top-1: time and saved bytes of one MoE layer.

    python -m benchmarks.routers [--rounds 9]

Training is forward and backward with the balance loss. Ratios are of medians of interleaved rounds. With `top_k` 2 the experts
compute twice as much: those rows are beside softmax top-2.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.layer import saved_bytes
from benchmarks.timing import command_line, interleaved, settings
from nlgmoe import FrozenTopK, HashRouterConfig, SigmoidTopK, SoftmaxTopK, UniformRouterConfig
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.router import RoutingContext
from nlgmoe.parts import RouterConfig

SEQUENCES, LENGTH, HIDDEN, EXPERTS, VOCABULARY = 8, 256, 256, 16, 4096
ROUTERS: dict[str, tuple[int, RouterConfig | None]] = {
    "softmax top-1": (1, None),
    "softmax top-1, gate scale": (1, SoftmaxTopK(gate_scale=2.0)),
    "sigmoid top-1": (1, SigmoidTopK()),
    "hash": (1, HashRouterConfig()),
    "uniform": (1, UniformRouterConfig()),
    "frozen": (1, FrozenTopK()),
    "softmax top-2": (2, None),
    "sigmoid top-2": (2, SigmoidTopK()),
    "sigmoid top-2, sequence loss": (2, SigmoidTopK(sequence_loss_coeff=1e-4)),
}


def layer_of(top_k: int, router: RouterConfig | None) -> MoELayer:
    """Build one dropless layer."""
    never_drops = router is not None and "token_dropping" not in router.uses  # and the setting has no effect
    moe = MoEConfig(EXPERTS, top_k=top_k, token_dropping=never_drops, router=router)
    layer = MoELayer(GPTConfig(VOCABULARY, LENGTH, 2, HIDDEN, 4, moe=moe), 1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def training(layer: MoELayer, x: torch.Tensor, context: RoutingContext) -> Callable[[], None]:
    """Return a forward and backward pass."""
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = None
        layer.zero_grad()
        y, routing = layer(x, context)
        balance, z_loss = router_losses([routing])
        (y.square().mean() + 0.01 * balance + 0.001 * z_loss + sum(routing.losses.values())).backward()

    return run


class Bound(nn.Module):
    """A layer with its context, for `saved_bytes`."""

    def __init__(self, layer: MoELayer, context: RoutingContext) -> None:
        super().__init__()
        self.layer, self.context = layer, context

    def forward(self, x: torch.Tensor) -> Any:
        """Apply the layer."""
        return self.layer(x, self.context)


def main() -> None:
    """Measure, print a table, write docs/results/routers.json."""
    arguments = command_line(__doc__.splitlines()[0], "routers", 9, ["training"])
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))
    context = RoutingContext(tokens, None, (0, 0, 0), torch.arange(LENGTH)[None])
    x = torch.randn(SEQUENCES, LENGTH, HIDDEN)
    layers = {name: layer_of(top_k, router) for name, (top_k, router) in ROUTERS.items()}
    seconds = interleaved({name: training(layer, x, context) for name, layer in layers.items()}, arguments.rounds)
    shape = [SEQUENCES * LENGTH, HIDDEN, EXPERTS]
    results: dict[str, Any] = {"settings": settings(rounds=arguments.rounds), "shape": shape, "routers": {}}
    print(f"{'router':<30} {'ms':>8} {'ratio':>6} {'saved MB':>9}")
    for name, (top_k, _) in ROUTERS.items():
        saved = saved_bytes(Bound(layers[name], context), x) / 1e6
        ratio = seconds[name] / seconds[f"softmax top-{top_k}"]
        results["routers"][name] = {"seconds": seconds[name], "ratio": ratio, "saved_mb": saved}
        print(f"{name:<30} {1e3 * seconds[name]:>8.2f} {ratio:>6.2f} {saved:>9.1f}")
    Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
