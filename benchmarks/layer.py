"""One MoE layer beside a dense FFN of the same FLOPs per token and beside DeepSpeed's; routers beside softmax. 1 minute.

    python -m benchmarks.layer [--only training routers]

Training is forward and backward, gradients freed before each. `floor` is a dense FFN that does the same FLOPs per
token. DeepSpeed's `MoE` and ours with capacity 1.0 drop tokens; the dropless ones compute every assignment. Routers: a
dropless layer of 16 experts of width 256 on 2,048 tokens, the losses of the router included, beside softmax of the same k.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Benchmark, Part, Table, interleaved
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers import routers
from nlgmoe.layers.balance import router_losses
from nlgmoe.layers.feed_forward import FeedForward
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.routing import RoutingContext
from nlgmoe.parts import RouterConfig

SHAPES = [(2048, 256, 8), (2048, 256, 32), (8192, 256, 64)]  # tokens, hidden size, experts; top-1
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = ("ours, dropless", "ours, capacity 1.0", "DeepSpeed, dropless", "DeepSpeed, capacity 1.0")
ROUTERS: dict[str, tuple[int, RouterConfig | None, dict[str, Any]]] = {
    "softmax top-1": (1, None, {}),
    "softmax top-1, gate scale": (1, None, {"gate_scale": 2.0}),
    "sigmoid top-1": (1, routers.SigmoidRouterConfig(), {}),
    "hash": (1, routers.HashRouterConfig(), {}),
    "uniform": (1, routers.UniformRouterConfig(), {}),
    "frozen": (1, routers.FrozenRouterConfig(), {}),
    "weight 1": (1, routers.UnitWeightRouterConfig(), {}),
    "quantile top-1": (1, routers.QuantileRouterConfig(), {}),
    "softmax top-2": (2, None, {}),
    "sigmoid top-2": (2, routers.SigmoidRouterConfig(), {}),
    "sigmoid top-2, sequence loss": (2, routers.SigmoidRouterConfig(sequence_loss_coeff=1e-4), {}),
    "quantile top-2": (2, routers.QuantileRouterConfig(), {}),
    "hashed top-2": (2, routers.HashedRouterConfig(), {}),
}


def ours(
    hidden: int, experts: int, k: int, dropping: bool, router: RouterConfig | None = None, **settings: Any
) -> MoELayer:
    """Return `MoELayer`, drawn at random."""
    moe = MoEConfig(experts, top_k=k, token_dropping=dropping, expert_interval=1, router=router, **settings)
    layer = MoELayer(GPTConfig(4096, 256, 1, hidden, 1, moe=moe), 0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def deepspeed(hidden: int, experts: int, dropping: bool) -> nn.Module:
    """Return DeepSpeed's layer, on one process."""
    from deepspeed.moe.layer import MoE

    expert = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU("tanh"), nn.Linear(4 * hidden, hidden))
    layer: nn.Module = MoE(hidden, expert, experts, drop_tokens=dropping)
    return layer


class Routed(nn.Module):
    """A layer with what a router reads. The router's losses are added to the output, to be computed and differentiated."""

    def __init__(self, layer: MoELayer, context: RoutingContext) -> None:
        super().__init__()
        self.layer, self.context = layer, context

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, H] -> [B, T, H]`."""
        y, routing = self.layer(x, self.context)
        balance, z_loss = router_losses([routing])
        output: Tensor = y + (0.01 * balance + 0.001 * z_loss + sum(routing.losses.values()))
        return output


def output_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the output of a layer, without its losses and counts."""
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def training(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Return a forward and a backward pass."""
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = None
        layer.zero_grad()
        output_of(layer, x).backward(gradient)

    return run


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes that autograd keeps from the forward to the backward pass, parameters aside."""
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = output_of(layer, x.clone().requires_grad_())
    del alive
    return sum(kept.values())


def half(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert everything but DeepSpeed's gate, which it keeps in fp32."""
    for name, parameter in layer.named_parameters():
        if "gate" not in name:
            parameter.data = parameter.data.to(dtype)
    return layer


def measure(rounds: int) -> list[dict[str, Any]]:
    """Return milliseconds of the floor, ratios to it, and the bytes that are saved, by shape and type."""
    measured = []
    for shape, (kind, dtype) in product(SHAPES, TYPES.items()):
        tokens, hidden, experts = shape
        torch.manual_seed(0)
        layers: dict[str, nn.Module] = {"floor": FeedForward(GPTConfig(8, 8, 1, hidden, 1), 4 * hidden)}
        for name, dropping in (("dropless", False), ("capacity 1.0", True)):
            layers[f"ours, {name}"] = ours(hidden, experts, 1, dropping)
            layers[f"DeepSpeed, {name}"] = deepspeed(hidden, experts, dropping)
        x = torch.randn(1, tokens, hidden).to(dtype)
        gradient = torch.randn_like(x)
        seconds = interleaved(
            {name: training(half(layer, dtype), x, gradient) for name, layer in layers.items()}, rounds
        )
        ratio = {name: value / seconds["floor"] for name, value in seconds.items() if name != "floor"}
        saved = {name: saved_bytes(layer, x) for name, layer in layers.items()}
        row = {"shape": shape, "type": kind, "floor_ms": 1e3 * seconds["floor"], "ratio": ratio, "saved_bytes": saved}
        measured.append(row)
    return measured


def measure_routers(rounds: int) -> dict[str, Any]:
    """Return seconds and saved bytes by router."""
    torch.manual_seed(0)
    context = RoutingContext(torch.randint(4096, (8, 256)), None, (0, 0, 0), torch.arange(256)[None])
    x = torch.randn(8, 256, 256)
    layers = {}
    for name, (k, router, settings) in ROUTERS.items():
        # A setting without effect stays at its default.
        never_drops = router is not None and "token_dropping" not in router.reads_fields
        layers[name] = Routed(ours(256, 16, k, never_drops, router, **settings), context)
    seconds = interleaved({name: training(layer, x, x) for name, layer in layers.items()}, rounds)
    return {name: {"seconds": seconds[name], "saved_mb": saved_bytes(layers[name], x) / 1e6} for name in layers}


def training_table(measured: list[dict[str, Any]]) -> Table:
    head = [
        "tokens, hidden, experts",
        "type",
        "rows an expert",
        "floor, ms",
        *PEERS,
        "saved, ours / DeepSpeed, dropless",
    ]
    rows: list[Any] = []
    for row in measured:
        (tokens, _, experts), saved = row["shape"], row["saved_bytes"]
        cells = [", ".join(map(str, row["shape"])), row["type"], tokens // experts, f"{row['floor_ms']:.0f}"]
        cells += [f"{row['ratio'][name]:.2f}" for name in PEERS]
        rows.append([*cells, f"{saved['ours, dropless'] / saved['DeepSpeed, dropless']:.2f}"])
    return head, rows


def routers_table(measured: dict[str, Any]) -> Table:
    rows: list[Any] = []
    for name, row in measured.items():
        ratio = row["seconds"] / measured[f"softmax top-{ROUTERS[name][0]}"]["seconds"]
        rows.append([name, f"{1e3 * row['seconds']:.0f}", f"{ratio:.2f}", f"{row['saved_mb']:.1f}"])
    return ["router", "ms", "of softmax's", "saved for the backward pass, MB"], rows


BENCHMARK = Benchmark(
    "layer",
    "performance.md",
    {"training": Part(measure, training_table, 7), "routers": Part(measure_routers, routers_table, 9)},
)

if __name__ == "__main__":
    BENCHMARK.run(__doc__)
