"""Sliding-window attention: a token attends to itself and the tokens before it, `window` in all (Longformer, arXiv 2004.05150).

Letters: B sequences, T new positions, S positions in all (cached + new), H hidden size, N heads, D width of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe import AttentionConfig, AttentionContext, GPTConfig
from nlgmoe.layers.rotary import rotate


@dataclass(frozen=True)
class WindowAttentionConfig(AttentionConfig):
    """Settings of sliding-window attention.

    Attributes:
        window: tokens that a token attends to, itself included; padding is not counted.
    """

    reads_fields = frozenset({"attention_dropout"})  # without an annotation: it is no setting
    window: int = 32

    def build(self, config: GPTConfig, block: int) -> nn.Module:
        """See `AttentionConfig`."""
        return WindowAttention(config, block, self.window)


class WindowAttention(nn.Module):
    """The layer of one block."""

    def __init__(self, config: GPTConfig, block: int, window: int) -> None:
        super().__init__()
        self.heads, self.block, self.window, self.dropout = config.num_heads, block, window, config.attention_dropout
        inner = config.num_heads * config.head_size
        self.qkv = nn.Linear(config.hidden_size, 3 * inner, bias=config.bias)
        self.output = nn.Linear(
            inner, config.hidden_size, bias=config.bias
        )  # `output`: divided by sqrt(2 * num_layers)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Attend, `[B, T, H] -> [B, T, H]`."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if context.rotation is not None:
            q, k = rotate(q, *context.rotation), rotate(k, *context.rotation)  # [B, N, T, D]
        if context.cache is not None:
            k, v = context.cache.extend(self.block, k, v)  # [B, N, S, D]
        new, total = q.shape[2], k.shape[2]
        visible = context.visible  # [B or 1, 1, T, S]
        if visible is None:
            visible = torch.ones(1, 1, new, total, dtype=torch.bool, device=x.device).tril(total - new)
        # Counted from the query backwards, in tokens that it sees: right also with padding, documents and a cache.
        distance = visible.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
        visible = visible & (distance <= self.window)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
        return self.output(y.transpose(1, 2).flatten(2))
