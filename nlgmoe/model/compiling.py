"""`torch.compile` of the modules of a GPT whose shapes do not depend on the routing."""

from __future__ import annotations

import torch
from torch import Tensor

from nlgmoe.layers.attention import AttentionContext
from nlgmoe.model.gpt import GPT, Block


def compile_dense_parts(model: GPT) -> None:
    """Compile attention and the dense feed-forward layers with `torch.compile`, at their first use.

    Generation stays uncompiled: its shapes change with every token. Compiled dropout draws other random numbers.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        _compile(block)


def _compile(block: Block) -> None:
    attend, compiled = block.attend, torch.compile(block.attend)

    def attend_compiled(x: Tensor, context: AttentionContext) -> Tensor:
        return attend(x, context) if context.cache is not None else compiled(x, context)

    block.__dict__["attend"] = attend_compiled
    if block.moe is None:
        block.__dict__["feed_forward"] = torch.compile(block.feed_forward)
