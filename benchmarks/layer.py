"""One MoE layer: what it costs beside a dense FFN of the same FLOPs per token, beside DeepSpeed's and Hugging Face's.

    python -m benchmarks.layer [--rounds 9] [--only training|inference]

Training is forward and backward, gradients freed before each. `floor` is a dense FFN that does the same FLOPs per token (k
FFNs' width). DeepSpeed's `MoE` and ours with capacity 1.0 drop tokens; the dropless ones compute every assignment.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import command_line, interleaved, settings
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.feed_forward import FeedForward, gelu
from nlgmoe.layers.moe import MoELayer

TRAINING = [(2048, 256, 8, 1), (2048, 256, 32, 1), (2048, 512, 16, 2), (8192, 256, 64, 1), (4096, 512, 64, 1)]
INFERENCE = [(tokens, 1024, experts, 1) for experts in (64, 128) for tokens in (1, 4, 16)]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OneExpert(nn.Module):
    """DeepSpeed's experts are copies of a module; this is our FFN's body."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.expand, self.project = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., H] -> [..., H]`."""
        projected: Tensor = self.project(gelu(self.expand(x)))
        return projected


def ours(hidden: int, experts: int, k: int, dropping: bool) -> nn.Module:
    """`MoELayer`."""
    moe = MoEConfig(experts, top_k=k, token_dropping=dropping, expert_interval=1)
    layer = MoELayer(GPTConfig(64, 16, 1, hidden, 1, moe=moe), 0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def deepspeed(hidden: int, experts: int, k: int, dropping: bool, min_capacity: int = 4) -> nn.Module:
    """DeepSpeed's layer, on one process."""
    from deepspeed.moe.layer import MoE

    layer = MoE(
        hidden,
        OneExpert(hidden),
        experts,
        k=k,
        drop_tokens=dropping,
        min_capacity=min_capacity,
        top2_2nd_expert_sampling=False,
    )
    return layer


def output_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer makes of `x`, without its extras."""
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def training(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """A forward and a backward pass."""
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        output_of(layer, x).backward(gradient)

    return run


def inference(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward pass."""
    layer.eval()

    def run() -> None:
        with torch.no_grad():
            output_of(layer, x)

    return run


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps from the forward to the backward pass, parameters aside."""
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
    """Everything in `dtype` but the gate, which DeepSpeed keeps in fp32."""
    for name, parameter in layer.named_parameters():
        if "gate" not in name:
            parameter.data = parameter.data.to(dtype)
    return layer


def measure(shape: tuple[int, int, int, int], name: str, train: bool, rounds: int) -> dict[str, Any]:
    """Ratios to the floor, and bytes saved."""
    tokens, hidden, experts, k = shape
    torch.manual_seed(0)
    layers = {
        "floor": FeedForward(GPTConfig(8, 8, 1, hidden, 1), 4 * hidden * k),
        "ours, dropless": ours(hidden, experts, k, False),
        "DeepSpeed, dropless": deepspeed(hidden, experts, k, False, min(4, tokens)),
    }
    if train:
        layers |= {
            "ours, capacity 1.0": ours(hidden, experts, k, True),
            "DeepSpeed, capacity 1.0": deepspeed(hidden, experts, k, True),
        }
    layers = {label: half(layer, TYPES[name]) for label, layer in layers.items()}
    x = torch.randn(1, tokens, hidden).to(TYPES[name])
    gradient = torch.randn_like(x)
    runs = {label: training(layer, x, gradient) if train else inference(layer, x) for label, layer in layers.items()}
    seconds = interleaved(runs, rounds)
    row: dict[str, Any] = {"shape": shape, "type": name, "floor_ms": 1000 * seconds["floor"]}
    row["ratio"] = {label: value / seconds["floor"] for label, value in seconds.items() if label != "floor"}
    if train:
        row["saved_bytes"] = {label: saved_bytes(layer, x) for label, layer in layers.items()}
    return row


def main() -> None:
    arguments = command_line(__doc__.splitlines()[0], "layer", 9, ["training", "inference"])
    results: dict[str, Any] = {
        "settings": settings(freed_memory_kept=arguments.freed_memory_kept, rounds=arguments.rounds)
    }
    print(json.dumps(results["settings"], indent=1))
    for kind, shapes in {"training": TRAINING, "inference": INFERENCE}.items():
        if arguments.only not in (None, kind):
            continue
        results[kind] = []
        for shape in shapes:
            for name in TYPES:
                row = measure(shape, name, kind == "training", arguments.rounds)
                results[kind].append(row)
                ratios = ", ".join(f"{label} {value:.2f}" for label, value in row["ratio"].items())
                print(f"{kind} {shape} {name}: floor {row['floor_ms']:.2f} ms; {ratios}", flush=True)
                if "saved_bytes" in row:
                    print(
                        "   MB saved: "
                        + ", ".join(f"{label} {value / 1e6:.1f}" for label, value in row["saved_bytes"].items())
                    )
    with open(arguments.output, "w") as file:
        file.write(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
