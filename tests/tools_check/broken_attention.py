"""Multi-head attention with one defect; each is found by the property that it is listed under, and by no other one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nlgmoe import AttentionConfig, GPTConfig
from nlgmoe.layers.attention import CausalSelfAttention
from nlgmoe.tools.check.attention import AttentionLayer
from tests.tools_check.defects import edited, with_methods

Spoil = Callable[[CausalSelfAttention], None]


@dataclass(frozen=True)
class BrokenConfig(AttentionConfig):
    reads_fields = frozenset({"attention_dropout"})
    defect: str = ""

    def build(self, config: GPTConfig, block: int) -> nn.Module:
        module = CausalSelfAttention(config, block)
        DEFECTS[self.defect][1](module)
        return module


def broken(defect: str) -> AttentionLayer:
    config = GPTConfig(61, 64, 2, 16, 4, rope_theta=1e4, attention=BrokenConfig(defect))
    return AttentionLayer(defect, config=config)


def attention(*changes: tuple[str, str]) -> Spoil:
    return lambda module: with_methods(module, forward=edited(CausalSelfAttention.forward, *changes))


def output(new: str, statement: str = "pass") -> Spoil:
    """Return something else than `y`, after a statement."""
    behind = f"y = self.output(y.transpose(1, 2).flatten(2))\n    {statement}\n    return {new}"
    return attention(("return self.output(y.transpose(1, 2).flatten(2))", behind))


def with_buffer(name: str, persistent: bool, spoil: Spoil) -> Spoil:
    def both(module: CausalSelfAttention) -> None:
        module.register_buffer(name, torch.rand(16), persistent)
        spoil(module)

    return both


def dropout_of_its_own(module: CausalSelfAttention) -> None:
    module.generator = torch.Generator("cpu").manual_seed(module.block)
    dropped = "y * (torch.rand(y.shape, generator=self.generator) > self.dropout)"
    output(f"{dropped} if self.training and self.dropout else y")(module)


ROTATES = "if context.rotation is not None:"
BY_INDEX = """begin = 0 if context.cache is None else context.cache.length - x.shape[1]
    turn = rotations(torch.arange(begin, begin + x.shape[1])[None], self.head_size, 1e4)
    context = AttentionContext(context.positions, context.visible, context.cache, turn)
    """
SPLITS = "q, k, v = self.qkv(x)"
# The mask keeps which keys are padding: those that no other position sees.
PADDING_ALONE = """if context.visible is not None and context.cache is None:
        square = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        real = context.visible.sum(dim=2, keepdim=True) > 1  # [B, 1, 1, S]
        visible = square.tril() & (real | torch.eye(x.shape[1], dtype=torch.bool, device=x.device))
        context = AttentionContext(context.positions, visible, context.cache, context.rotation)
    """
ATTENDS = "attend(q, k, v, context,"
BLIND = f"F.scaled_dot_product_attention(q, k, v) if self.training and context.visible is None else {ATTENDS}"
READ = "y / y.detach().abs().max() if y.detach().abs().max() > 1e6 else y"

STATE, TYPES = "a resumed run is the same to the bit", "types are kept"
DEFECTS: dict[str, tuple[str, Spoil]] = {
    "a detached branch": ("gradients equal finite differences", output("y + self.output(x).detach()")),
    "no triangle in training": ("a token sees no later one", attention((ATTENDS, BLIND))),
    "one key of the cache for all blocks": ("a cache changes no output", lambda module: setattr(module, "block", 0)),
    "positions count padding": ("padding changes no output", attention((ROTATES, BY_INDEX + ROTATES))),
    "documents are ignored": ("documents do not see each other", attention((SPLITS, PADDING_ALONE + SPLITS))),
    "outputs in fp32": (TYPES, output("y.float() if y.dtype.itemsize < 4 else y")),
    "overflow in half precision": (TYPES, output("(y * 1e5) / 1e5")),
    "dropout of its own generator": ("recomputation changes no gradient", dropout_of_its_own),
    "a read by the host": ("the host reads no device", output(READ)),
    "a buffer that is not saved": (STATE, with_buffer("drawn", False, output("y * self.drawn.to(y.dtype)"))),
    "a counter in forward": (STATE, with_buffer("seen", True, output("y", "self.seen += x.shape[1]"))),
}
