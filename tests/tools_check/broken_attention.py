"""Multi-head attention with one defect; each is found by the property that it is listed under, and by no other one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nlgmoe import AttentionConfig, AttentionContext, GPTConfig
from nlgmoe.layers.attention import CausalSelfAttention
from nlgmoe.layers.rotary import rotations
from nlgmoe.tools.check.attention import AttentionLayer


class Broken(CausalSelfAttention):
    """Changes the context before the layer, or its output behind it."""

    context: Callable[[Broken, Tensor, AttentionContext], AttentionContext] | None = None
    output: Callable[[Broken, Tensor, Tensor], Tensor] | None = None
    drawn: Tensor
    seen: Tensor

    def __init__(self, config: GPTConfig, block: int) -> None:
        super().__init__(config, block)
        self.generator = torch.Generator("cpu").manual_seed(block)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        y = super().forward(x, context if self.context is None else self.context(x, context))
        return y if self.output is None else self.output(x, y)


@dataclass(frozen=True)
class BrokenConfig(AttentionConfig):
    reads_fields = frozenset({"attention_dropout"})
    defect: str = ""

    def build(self, config: GPTConfig, block: int) -> nn.Module:
        _, change = DEFECTS[self.defect]
        kind = type("BrokenAttention", (Broken,), change if isinstance(change, dict) else {})
        module = kind(config, block)
        if callable(change):
            change(module)
        return module


def broken(defect: str) -> AttentionLayer:
    config = GPTConfig(61, 64, 2, 16, 4, rope_theta=1e4, attention=BrokenConfig(defect))
    return AttentionLayer(defect, config=config)


def blind_in_evaluation_alone(self: Broken, x: Tensor, context: AttentionContext) -> AttentionContext:
    if not self.training or context.visible is not None:
        return context
    return replace(context, visible=torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device))


def positions_by_index(self: Broken, x: Tensor, context: AttentionContext) -> AttentionContext:
    begin = 0 if context.cache is None else context.cache.length - x.shape[1]
    index = torch.arange(begin, begin + x.shape[1], device=x.device)
    return replace(context, rotation=rotations(index[None], self.head_size, 1e4))


def mask_of_padding_alone(self: Broken, x: Tensor, context: AttentionContext) -> AttentionContext:
    """Keep from the mask which keys are padding: those that no other position sees."""
    if context.visible is None or context.cache is not None:
        return context
    square = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
    real = context.visible.sum(dim=2, keepdim=True) > 1  # [B, 1, 1, S]
    itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return replace(context, visible=square.tril() & (real | itself))


def dropout_of_its_own(self: Broken, x: Tensor, y: Tensor) -> Tensor:
    if not self.training or not self.dropout:
        return y
    return y * (torch.rand(y.shape, generator=self.generator) > self.dropout)


def read_on_host(self: Broken, x: Tensor, y: Tensor) -> Tensor:
    return y / y.detach().abs().max() if y.detach().abs().max() > 1e6 else y


def count(self: Broken, x: Tensor, y: Tensor) -> Tensor:
    self.seen += x.shape[1]
    return y


def with_buffer(name: str, persistent: bool) -> Callable[[Broken], None]:
    return lambda module: module.register_buffer(name, torch.rand(16), persistent)


def counting(module: Broken) -> None:
    with_buffer("seen", True)(module)
    type(module).output = count


def scaled_by_a_buffer(module: Broken) -> None:
    with_buffer("drawn", False)(module)
    type(module).output = lambda self, x, y: y * self.drawn.to(y.dtype)


def one_key_of_the_cache(module: Broken) -> None:
    module.block = 0


STATE, TYPES = "a resumed run is the same to the bit", "types are kept"
DEFECTS: dict[str, tuple[str, dict[str, Any] | Callable[[Broken], None]]] = {
    "a detached branch": (
        "gradients equal finite differences",
        {"output": lambda self, x, y: y + self.project(x).detach()},
    ),
    "no triangle in training": ("a token sees no later one", {"context": blind_in_evaluation_alone}),
    "one key of the cache for all blocks": ("a cache changes no output", one_key_of_the_cache),
    "positions count padding": ("padding changes no output", {"context": positions_by_index}),
    "documents are ignored": ("documents do not see each other", {"context": mask_of_padding_alone}),
    "outputs in fp32": (TYPES, {"output": lambda self, x, y: y.float() if y.dtype.itemsize < 4 else y}),
    "overflow in half precision": (TYPES, {"output": lambda self, x, y: (y * 1e5) / 1e5}),
    "dropout of its own generator": ("recomputation changes no gradient", {"output": dropout_of_its_own}),
    "a read by the host": ("the host reads no device", {"output": read_on_host}),
    "a buffer that is not saved": (STATE, scaled_by_a_buffer),
    "a counter in forward": (STATE, counting),
}
