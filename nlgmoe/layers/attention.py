"""Causal self-attention, with a key-value cache for generation.

Letters in shape comments: B sequences, T new positions, S positions in all (cached + new), H hidden size, N heads,
D = H / N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe.validation import RunError


class KVCache:
    """Keys and values of earlier positions, of every layer; `GPT.forward` extends it.

    Holds at most `max_len` positions per sequence. Memory is allocated layer by layer at the first use.

    Attributes:
        length: positions stored; those of the tokens that are being read included.
        mask: `[B, length]` bool, False where a stored position is padding; None: no padding.
    """

    def __init__(self, max_len: int) -> None:
        self.max_len = max_len
        self.length = self._start = 0  # new positions are written from `_start` on
        self.mask: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, new: int, mask: Tensor | None) -> None:
        """Make room for `new` positions in every layer; `mask` `[B, length + new]` replaces the stored one."""
        if self.length + new > self.max_len:
            raise ValueError(
                f"the cache holds {self.max_len} positions, {self.length + new} are needed; make KVCache(max_len) larger"
            )
        self._start, self.length, self.mask = self.length, self.length + new, mask

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k`, `v` `[B, N, T, D]` of `layer`. Returns the keys and values of all positions, `[B, N, S, D]`."""
        batch, heads, _, width = k.shape
        if layer not in self._layers:
            shape = (batch, heads, self.max_len, width)
            self._layers[layer] = k.new_empty(shape), v.new_empty(shape)
        keys, values = self._layers[layer]
        keys[:, :, self._start : self.length] = k
        values[:, :, self._start : self.length] = v
        return keys[:, :, : self.length], values[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows` `[B']` int64, in that order; a row may be repeated."""
        self._layers = {
            layer: (keys.index_select(0, rows), values.index_select(0, rows))
            for layer, (keys, values) in self._layers.items()
        }
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows)


@dataclass(frozen=True)
class AttentionContext:
    """What every attention layer needs beside the hidden states; `GPT.forward` builds one for each batch.

    Attributes:
        positions: `[1 or B, T]` int64, position of each token in its document, padding not counted.
        visible: `[B or 1, 1, T, S]` bool, True where a query may attend to a key; None: the causal triangle, or all keys if T
            is 1.
        cache: earlier keys and values; the new ones are stored in it.
    """

    positions: Tensor
    visible: Tensor | None = None
    cache: KVCache | None = None

    @staticmethod
    def build(
        tokens: Tensor, token_mask: Tensor | None, documents: Tensor | None, cache: KVCache | None, seq_len: int
    ) -> AttentionContext:
        """Build it from the arguments of `GPT.forward`, and reserve room in the cache."""
        assert cache is None or documents is None, "a cache holds one document"
        new, cached = tokens.shape[1], cache.length if cache is not None else 0
        history = extend_mask(token_mask, cache, tokens)  # [B, S] or None
        longest = cached + new
        if longest > seq_len and history is not None:
            longest = int(history.sum(dim=1).max())
        if longest > seq_len:
            raise RunError(
                f"a sequence of {longest} tokens is longer than seq_len={seq_len}; shorten it, or train with a larger seq_len"
            )
        if cache is not None:
            cache.reserve(new, history)
        visible = visible_keys(history, new, cached, tokens.device, documents)
        return AttentionContext(positions_of(history, new, cached, tokens.device, documents), visible, cache)


class CausalSelfAttention(nn.Module):
    """Multi-head attention to a position itself and earlier ones."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, layer_index: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.layer_index = layer_index
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.project = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Attend, `[B, T, H] -> [B, T, H]`."""
        batch, new, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, new, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()  # [B, N, T, D]
        if context.cache is not None:
            k, v = context.cache.extend(self.layer_index, k, v)  # [B, N, S, D]
        # A compiled `new > 1` is symbolic once lengths differ; `is_causal` has to be a bool.
        causal = True if context.visible is None and new > 1 else False  # noqa: SIM210
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=context.visible, dropout_p=self.dropout if self.training else 0.0, is_causal=causal
        )
        return self.project(y.transpose(1, 2).reshape(batch, new, hidden))


def visible_keys(
    token_mask: Tensor | None, new: int, cached: int, device: torch.device, documents: Tensor | None = None
) -> Tensor | None:
    """Return the attention mask, `[B or 1, 1, T, S]` bool; None where `CausalSelfAttention` needs none.

    Args:
        token_mask: `[B, S]`, False at padding; None if there is none.
        new: number of new positions (T).
        cached: number of positions in the cache (S - T).
        device: of the mask.
        documents: `[B, T]`, the document of each position; attention ends at its borders. None: one document. Not with a cache.

    A padded query attends to itself, so that its softmax is defined; its output is not used.
    """
    if token_mask is None and documents is None and (cached == 0 or new == 1):
        return None
    total = cached + new
    causal = torch.ones(new, total, dtype=torch.bool, device=device).tril(diagonal=cached)[None, None]  # [1, 1, T, S]
    if documents is not None:
        causal = causal & (documents[:, None, :, None] == documents[:, None, None, :])  # [B, 1, T, T]
    if token_mask is None:
        return causal
    itself = torch.zeros(new, total, dtype=torch.bool, device=device)
    itself[:, cached:].fill_diagonal_(True)
    return causal & (token_mask[:, None, None, :] | itself)


def extend_mask(token_mask: Tensor | None, cache: KVCache | None, tokens: Tensor) -> Tensor | None:
    """Return the mask of cached and new positions, `[B, S]`; None if no position is padding."""
    if cache is None or cache.length == 0 or (token_mask is None and cache.mask is None):
        return token_mask
    new = torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask
    old = cache.mask if cache.mask is not None else new.new_ones(len(tokens), cache.length)
    return torch.cat([old, new], dim=1)


def positions_of(
    history: Tensor | None, new: int, cached: int, device: torch.device, documents: Tensor | None = None
) -> Tensor:
    """Return position numbers of the new tokens, `[1 or B, T]`; padding is not counted, and every document begins at 0."""
    if history is None:
        numbers = torch.arange(cached, cached + new, device=device)[None]
    else:
        numbers = (history.long().cumsum(dim=1) - 1).clamp_min(0)[:, cached:]
    if documents is None:
        return numbers
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    earlier = numbers if history is None else history.long().cumsum(dim=1) - history.long()  # real tokens before each
    return (numbers - torch.where(begins, earlier, 0).cummax(dim=1).values).clamp_min(0)
