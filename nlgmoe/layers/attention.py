"""Causal self-attention, with a key-value cache for generation; `mla.py` has another one, `rotary.py` the positions.

Letters in shape comments: B sequences, T new positions, S positions in all (cached + new), H hidden size, N query heads, K key
heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe.config import GPTConfig
from nlgmoe.layers.precision import computing_dtype
from nlgmoe.layers.rotary import rotate, rotations
from nlgmoe.parts import ATTENTION_FIELDS, AttentionConfig
from nlgmoe.validation import RunError, SettingError


class KVCache:
    """Keys and values of earlier positions, of every layer; `GPT.forward` extends it.

    Holds at most `max_len` positions per sequence. Memory is allocated layer by layer at the first use.
    """

    def __init__(self, max_len: int) -> None:
        self.max_len = max_len
        self.length = 0  # positions stored, those of the current tokens included
        self._start = 0  # new positions are written from here on
        self.mask: Tensor | None = None  # `[B, length]` bool, False at padding; None: no padding
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, new: int, mask: Tensor | None) -> None:
        """Make room for `new` positions in every layer; `mask` `[B, length + new]` replaces the stored one."""
        if self.length + new > self.max_len:
            raise SettingError(
                f"the cache holds {self.max_len} positions, {self.length + new} are needed; make KVCache(max_len) larger"
            )
        self._start, self.length, self.mask = self.length, self.length + new, mask

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k`, `v` `[B, K, T, D]` of `layer`. Returns the keys and values of all positions, `[B, K, S, D]`.

        K, D and the type may differ between the two: an attention may store other tensors than keys and values.
        """
        if layer not in self._layers:
            keys, values = (part.new_empty(*part.shape[:2], self.max_len, part.shape[3]) for part in (k, v))
            self._layers[layer] = keys, values
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
    """Inputs of every attention layer besides the hidden states; `GPT.forward` builds one for each batch.

    Attributes:
        positions: `[1 or B, T]` int64, position of each token in its document, padding not counted.
        visible: `[B or 1, 1, T, S]` bool, True where a query may attend to a key; None: the causal triangle, or all keys if T
            is 1.
        cache: earlier keys and values; the new ones are stored in it.
        rotation: cosines and sines of rotary position embeddings (`rotations`); None: positions are learned.
    """

    positions: Tensor
    visible: Tensor | None = None
    cache: KVCache | None = None
    rotation: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def build(
        config: GPTConfig,
        tokens: Tensor,
        token_mask: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> AttentionContext:
        """Build the context from the arguments of `GPT.forward`, and reserve room in the cache."""
        assert cache is None or documents is None, "a cache holds one document"
        new, cached = tokens.shape[1], cache.length if cache is not None else 0
        history = extend_mask(token_mask, cache, tokens)  # [B, S] or None
        positions = positions_of(history, new, cached, tokens.device, documents)
        longest = cached + new
        if longest > config.seq_len and not (history is None and documents is None):
            longest = int(positions.max()) + 1
        if longest > config.seq_len:
            raise RunError(
                f"a sequence of {longest} tokens is longer than seq_len={config.seq_len}; shorten it, or train with a larger "
                "seq_len"
            )
        if cache is not None:
            cache.reserve(new, history)
        visible = visible_keys(history, new, cached, tokens.device, documents)
        theta, rotation = config.rope_theta, None
        if theta is not None:
            rotation = rotations(positions, config.rotary_size, theta, config.rotary_scaling)
        return AttentionContext(positions, visible, cache, rotation)


@dataclass(frozen=True)
class MultiHead(AttentionConfig):
    """The attention of a configuration that names none."""

    reads_fields = ATTENTION_FIELDS

    def saved_bytes(self, config: GPTConfig, itemsize: int) -> int:
        heads, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
        size = (config.hidden_size + heads + 2 * keys + heads) * itemsize  # input; q, k, v; output
        if config.rope_theta is not None or config.qk_norm is not None:
            # Other queries and keys; those before stay, because v is a view of one tensor.
            size += (heads + keys) * itemsize
        if config.qk_norm is not None:
            size += 4 * (2 if config.qk_norm == "projection" else config.num_heads + config.kv_heads)  # 1/rms
        return size + 4 * config.num_heads  # logsumexp

    def build(self, config: GPTConfig, block: int) -> CausalSelfAttention:
        return CausalSelfAttention(config, block)


def attention_config(config: GPTConfig) -> AttentionConfig:
    """Return the settings of a model's attention: those that it names, or multi-head attention."""
    return config.attention or MultiHead()


def build_attention(config: GPTConfig, block: int) -> nn.Module:
    """Build the attention of a block."""
    settings = attention_config(config)
    module: nn.Module = settings.build(settings.as_read(config), block)
    return module


class CausalSelfAttention(nn.Module):
    """Multi-head attention to a position itself and earlier ones.

    q, k, v = x W_qkv                           N query heads and K key heads, each of them for N / K query heads
    q, k    = rotate(norm(q)), rotate(norm(k))  with `qk_norm` and `rope_theta`
    y       = softmax(q k^T * scale) v W_output    `attention_scale`, or 1 / sqrt(D)
    """

    def __init__(self, config: GPTConfig, block: int) -> None:
        super().__init__()
        heads, key_heads, size = config.num_heads, config.kv_heads, config.head_size
        self.head_size = size
        self.dropout, self.scale = config.attention_dropout, config.attention_scale
        self.block = block
        self.widths = [heads * size, key_heads * size, key_heads * size]
        self.qkv = nn.Linear(config.hidden_size, sum(self.widths), bias=config.has_qkv_bias)
        self.output = nn.Linear(heads * size, config.hidden_size, bias=config.bias)
        self.norms_heads = config.qk_norm == "head"
        if config.qk_norm is not None:
            query, key = (size, size) if self.norms_heads else self.widths[:2]
            self.query_norm: nn.Module = nn.RMSNorm(query, eps=config.layer_norm_eps)
            self.key_norm: nn.Module = nn.RMSNorm(key, eps=config.layer_norm_eps)
        else:
            self.query_norm = self.key_norm = nn.Identity()

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Attend, `[B, T, H] -> [B, T, H]`."""
        q, k, v = self.qkv(x).split(self.widths, dim=-1)  # [B, T, N * D], [B, T, K * D] twice
        if not self.norms_heads:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in (q, k, v))  # [B, N or K, T, D]
        if self.norms_heads:
            q, k = self.query_norm(q), self.key_norm(k)
        if context.rotation is not None:
            q, k = rotate(q, *context.rotation), rotate(k, *context.rotation)
        if context.cache is not None:
            k, v = context.cache.extend(self.block, k, v)  # [B, K, S, D]
        y = attend(q, k, v, context, self.scale, self.dropout if self.training else 0.0)
        return self.output(y.transpose(1, 2).flatten(2))


def attend(
    q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Return the weighted sums of values, `[B, N, T, D]`, for queries of that shape.

    Keys and values are `[B, K, S, D]`; each of the K heads is for N / K query heads.
    """
    visible, shares_keys = context.visible, k.shape[1] != q.shape[1]
    # Of the fused kernels of GPUs flash attention alone shares keys: in half precision, without a mask.
    fused = visible is None and (q.device.type == "cpu" or computing_dtype(q).itemsize == 2)
    if shares_keys and not fused:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    # A compiled `T > 1` is symbolic once lengths differ; `is_causal` has to be a bool.
    causal = True if visible is None and q.shape[2] > 1 else False  # noqa: SIM210
    return F.scaled_dot_product_attention(
        q, k, v, visible, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=shares_keys and fused
    )


def build_norm(config: GPTConfig) -> nn.Module:
    """Return a norm of the residual stream."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.bias)


def visible_keys(
    token_mask: Tensor | None, new: int, cached: int, device: torch.device, documents: Tensor | None = None
) -> Tensor | None:
    """Return the attention mask, `[B or 1, 1, T, S]` bool; None where `CausalSelfAttention` needs none.

    Args:
        token_mask: `[B, S]`, False at padding; None if there is none.
        new: number of new positions (T).
        cached: number of positions in the cache (S - T).
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
