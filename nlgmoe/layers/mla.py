"""Multi-head latent attention: keys and values of all heads are made of one narrow vector a token, which alone is cached.

    c, r    = x W_down                       [C], [R]   latent, and the rotary part of the key, which all heads share
    k_n, v_n = norm(c) W_up                  [P], [V]   of head n
    q_n, s_n = norm(x W_query_down) W_query_up          [P], [R]   or x W_query, without `q_lora_rank`
    score_n = (q_n k_n + rotate(s_n) rotate(r)) * scale            `attention_scale`, or 1 / sqrt(P + R)
    y       = concat_n(softmax(score_n) v_n) W_output

DeepSeek-V2 (arXiv 2405.04434, section 2.1); tests/equivalence compares with `transformers`. Generation expands the cached latents
of all positions at each step, as `transformers` does.

Letters: B sequences, T new positions, S positions in all (cached + new), H hidden size, N heads, C width of the latent; P, R and
V widths of the plain and rotary parts of a key and of a value; D the largest of P + R and V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nlgmoe.config import GPTConfig
from nlgmoe.layers.attention import AttentionContext, attend
from nlgmoe.layers.precision import cast_by_autocast
from nlgmoe.layers.rotary import rotate
from nlgmoe.parts import AttentionConfig
from nlgmoe.validation import require, require_above, require_at_least, require_valid


@dataclass(frozen=True)
class MLAConfig(AttentionConfig):
    """Settings of multi-head latent attention, with the names of DeepSeek's configurations.

    Attributes:
        kv_lora_rank: width of the latent of keys and values, in values per token.
        qk_nope_head_dim: width of the part of a head's queries and keys that is not rotated, in values.
        qk_rope_head_dim: width of the part that is rotated, in values; an even number.
        v_head_dim: width of a head's value vectors.
        q_lora_rank: width of the latent of queries; null: queries are one product.
        norm_eps: added to the mean square in the norms of the latents, whatever `layer_norm_eps` is.
    """

    reads_fields = frozenset({"attention_scale", "attention_dropout"})

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_valid(self)
        widths = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")
        require_at_least(1, self, *widths)
        require_above(0, self, "norm_eps")

    def check(self, config: GPTConfig) -> None:
        require(config.rope_theta is not None, "rope_theta=None does not fit MLAConfig; set it, such as 10000.0")

    def rotary_size(self, config: GPTConfig) -> int:
        return self.qk_rope_head_dim

    def score_widths(self, config: GPTConfig) -> tuple[int, int]:
        """See `AttentionConfig`; without the zeros that make the widths equal."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim

    def saved_bytes(self, config: GPTConfig, itemsize: int) -> int:
        key, value = self.score_widths(config)
        width = max(key, value)
        # Input; latent before and after its norm.
        size = config.hidden_size + 2 * self.kv_lora_rank + self.qk_rope_head_dim
        size += 2 * (self.q_lora_rank or 0)
        per_head = 3 * width  # query, key, output
        # Values are a view of one tensor with the plain keys, or else padded; their output is then a copy.
        per_head += self.qk_nope_head_dim + value if value == width else width + value
        rows = 1 + (self.q_lora_rank is not None) + config.num_heads  # 1/rms of each norm; logsumexp
        return (size + config.num_heads * per_head) * itemsize + 4 * rows

    def build(self, config: GPTConfig, block: int) -> nn.Module:
        return LatentAttention(self, config, block)


class LatentAttention(nn.Module):
    """The attention layer of `MLAConfig`."""

    def __init__(self, settings: MLAConfig, config: GPTConfig, block: int) -> None:
        super().__init__()
        hidden, heads, eps, bias = config.hidden_size, config.num_heads, settings.norm_eps, config.bias
        self.plain, self.rotary = settings.qk_nope_head_dim, settings.qk_rope_head_dim
        self.rank, self.values = settings.kv_lora_rank, settings.v_head_dim
        self.heads, self.block = heads, block
        self.scale = config.attention_scale or (self.plain + self.rotary) ** -0.5
        self.dropout = config.attention_dropout
        if settings.q_lora_rank is None:
            self.query = nn.Linear(hidden, heads * (self.plain + self.rotary), bias=False)
        else:
            self.query_down = nn.Linear(hidden, settings.q_lora_rank, bias=bias)
            self.query_norm = nn.RMSNorm(settings.q_lora_rank, eps=eps)
            self.query_up = nn.Linear(settings.q_lora_rank, heads * (self.plain + self.rotary), bias=False)
        self.has_query_latent = settings.q_lora_rank is not None
        self.key_value_down = nn.Linear(hidden, self.rank + self.rotary, bias=bias)
        self.key_value_norm = nn.RMSNorm(self.rank, eps=eps)
        self.key_value = nn.Linear(self.rank, heads * (self.plain + self.values), bias=False)
        self.output = nn.Linear(heads * self.values, hidden, bias=bias)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Attend, `[B, T, H] -> [B, T, H]`."""
        assert context.rotation is not None
        x = cast_by_autocast(x)  # two products read it
        cos, sin = context.rotation  # [1 or B, 1, T, R]
        q = self.query_up(self.query_norm(self.query_down(x))) if self.has_query_latent else self.query(x)
        q = q.unflatten(-1, (self.heads, -1))  # [B, T, N, P + R]
        q_plain, q_rotary = q.split([self.plain, self.rotary], dim=-1)
        latent, k_rotary = self.key_value_down(x).split([self.rank, self.rotary], dim=-1)  # [B, T, C], [B, T, R]
        latent, k_rotary = (
            self.key_value_norm(latent)[:, None],
            rotate(k_rotary[:, None], cos, sin),
        )  # [B, 1, T, C or R]
        if context.cache is not None:
            latent, k_rotary = context.cache.extend(self.block, latent, k_rotary)  # [B, 1, S, C or R]
        expanded = self.key_value(latent[:, 0]).unflatten(-1, (self.heads, -1))  # [B, S, N, P + V]
        k_plain, v = expanded.split([self.plain, self.values], dim=-1)
        k_rotary = k_rotary.transpose(1, 2).expand(-1, -1, self.heads, -1)  # [B, S, N, R]

        # Parts are joined as [B, T, N, D], the layout of products: the fused kernel needs no other copy of them.
        q = torch.cat([q_plain, rotate(q_rotary, cos.transpose(1, 2), sin.transpose(1, 2))], dim=-1)
        k = torch.cat([k_plain, k_rotary], dim=-1)
        width = max(self.plain + self.rotary, self.values)  # fused kernels need queries, keys and values of one width
        q, k, v = (_padded(part, width).transpose(1, 2) for part in (q, k, v))  # [B, N, T or S, D]
        y = attend(q, k, v, context, self.scale, self.dropout if self.training else 0.0)
        return self.output(y.transpose(1, 2)[..., : self.values].flatten(2))


def _padded(x: Tensor, width: int) -> Tensor:
    """Return `x` with zeros up to a last dimension of `width`."""
    missing = width - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x  # `F.pad` copies also without zeros
