"""The decoder: embeddings, blocks, final norm, and a head tied to the token embedding.

Letters in shape comments: B sequences, T new positions, S positions in all (cached + new), H hidden size, V vocabulary,
P rows of the padded table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nlgmoe.config import GPTConfig
from nlgmoe.layers.attention import CausalSelfAttention, KVCache, visible_keys
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.feed_forward import FeedForward
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.placement import ExpertPlacement
from nlgmoe.layers.router import Routing, RoutingContext
from nlgmoe.pyramid import experts_at, experts_per_layer
from nlgmoe.seeding import derive_seed

NoiseKey = tuple[int, ...]


@dataclass(frozen=True)
class GPTOutput:
    """What the model says about a batch.

    Attributes:
        hidden: `[B, T, H]`, after the final norm; `GPT.logits` and the losses take it from here.
        routings: one `Routing` per MoE block, from the first to the last.
    """

    hidden: Tensor
    routings: list[Routing]


class Block(nn.Module):
    """One transformer block.

    x ── norm ── attention ── dropout ──(+)── norm ── FFN or MoE ── dropout ──(+)── x
    └──────────────────────────────────┘ └───────────────────────────────────┘
    """

    def __init__(self, config: GPTConfig, layer_index: int, placement: ExpertPlacement | None = None) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = CausalSelfAttention(width, config.num_heads, config.attention_dropout, layer_index)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)
        self.moe = MoELayer(config, layer_index, placement) if experts_at(config, layer_index) else None
        self.ffn = None if self.moe is not None else FeedForward(width, config.ffn_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        x: Tensor,
        visible: Tensor | None = None,
        context: RoutingContext = RoutingContext(),  # noqa: B008 (frozen)
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """`[B, T, H] -> [B, T, H]`, and the routing if the block is MoE."""
        x = self.attend(x, visible, cache)
        if self.moe is None:
            return self.feed_forward(x), None
        h, routing = self.moe(self.ffn_norm(x), context)
        return x + self.dropout(h), routing

    def attend(self, x: Tensor, visible: Tensor | None, cache: KVCache | None) -> Tensor:
        """The block's first half."""
        return x + self.dropout(self.attention(self.attention_norm(x), visible, cache))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half of a block without experts."""
        assert self.ffn is not None
        return x + self.dropout(self.ffn(self.ffn_norm(x)))

    def compile_dense_parts(self) -> None:
        """See `GPT.compile_dense_parts`."""
        attend, compiled = self.attend, torch.compile(self.attend)

        def attend_compiled(x: Tensor, visible: Tensor | None, cache: KVCache | None) -> Tensor:
            return compiled(x, visible, None) if cache is None else attend(x, visible, cache)

        self.__dict__["attend"] = attend_compiled
        if self.moe is None:
            self.__dict__["feed_forward"] = torch.compile(self.feed_forward)


class GPT(nn.Module):
    """The whole model.

    Args:
        config: its shape.
        seed: of the initial weights (`reset_parameters`).
        activation_checkpointing: keep only each block's input for the backward pass and compute the rest again.
        placements: where the experts of each MoE block live, by block number; blocks not named have all of theirs here.
    """

    def __init__(
        self,
        config: GPTConfig,
        seed: int = 0,
        activation_checkpointing: bool = False,
        placements: Mapping[int, ExpertPlacement] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.token_embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.seq_len, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.blocks = nn.ModuleList(Block(config, layer, placements.get(layer)) for layer in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.reset_parameters(seed)

    def forward(
        self,
        tokens: Tensor,
        token_mask: Tensor | None = None,
        cache: KVCache | None = None,
        noise_key: NoiseKey | None = None,
        documents: Tensor | None = None,
    ) -> GPTOutput:
        """Read `tokens`.

        Args:
            tokens: `[B, T]` int64.
            token_mask: `[B, T]` bool, False at padding, wherever it stands: real tokens see neither it nor its position
                number, and it takes no expert slot. None if there is none.
            cache: keys and values of earlier calls; `tokens` continue them, and are added.
            noise_key: (seed, step, micro-batch index) of the routing's random draws; None draws from torch's global
                generator.
            documents: `[B, T]` int64, which document each position belongs to; those of one stand in a row. A position then
                sees its own document alone, and its number counts from where that begins. None: the sequence is one.

        Raises:
            ValueError: a sequence is longer than `config.seq_len`, padding not counted.
        """
        assert cache is None or documents is None, "a cache holds one document"
        new, cached = tokens.shape[1], cache.length if cache is not None else 0
        history = _extend_mask(token_mask, cache, tokens)  # [B, S] or None
        longest = cached + new
        if longest > self.config.seq_len and history is not None:
            longest = int(history.sum(dim=1).max())
        if longest > self.config.seq_len:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than seq_len={self.config.seq_len}; shorten it, or train "
                "with a larger seq_len"
            )
        visible = visible_keys(history, new, cached, tokens.device, documents)
        positions = _positions(history, new, cached, tokens.device, documents)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        x = self.dropout(x)  # [B, T, H]
        context, routings = RoutingContext(tokens, token_mask, noise_key), []
        for block in self.blocks:
            if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
                x, routing = checkpoint(block, x, visible, context, use_reentrant=False)
            else:
                x, routing = block(x, visible, context, cache)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length, cache.mask = cached + new, history
        return GPTOutput(self.final_norm(x), routings)

    def compile_dense_parts(self) -> None:
        """Compile attention and the dense feed-forward layers with `torch.compile`, at their first use.

        Generation, whose shapes change with every token, goes on as it was. Dropout draws other numbers than without.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compile_dense_parts()

    def has_placements(self, placements: Mapping[int, ExpertPlacement]) -> bool:
        """Whether the experts are those of `placements`; blocks not named have all of theirs here."""
        for layer, count in enumerate(experts_per_layer(self.config)):
            wanted = placements.get(layer, ExpertPlacement(first=0, count=count))
            moe = self.blocks[layer].moe
            if isinstance(moe, MoELayer) and (moe.placement.first, moe.placement.count) != (wanted.first, wanted.count):
                return False
        return True

    def parameter_counts(self) -> tuple[int, int]:
        """All parameters of the model, experts of other ranks included, and those that one token uses."""
        total = active = sum(parameter.numel() for parameter in self.parameters())
        for moe in [module for module in self.modules() if isinstance(module, MoELayer)]:
            one = sum(stack[0].numel() for stack in moe.experts.parameters())
            total += (moe.router.num_experts - moe.experts.count) * one
            active += (moe.top_k - moe.experts.count) * one
        return total, active

    @property
    def unembedding(self) -> Tensor:
        """`[P, H]`: the tied embedding table. The rows from `config.vocab_size` on are padding: no token, no logit, no gradient.

        Products take them all, because P is a multiple of `config.vocab_size_multiple`: fast GEMMs need rows of logits aligned to
        16 bytes, which rows of 50,257 values are not.
        """
        return self.token_embedding.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., H] -> [..., V]`, a view without the padding. Training uses `layers/losses.py` instead, which never holds all."""
        return (hidden @ self.unembedding.to(hidden.dtype).t())[..., : self.config.vocab_size]

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw the initial weights.

        Every linear and embedding weight is N(0, `init_std`), output projections of attention, FFN and experts N(0,
        `init_std / sqrt(2 * num_layers)`), biases are 0 and norms 1. Each tensor, and each expert of a stack, has a
        generator of its own, seeded by its name: the same model on any number of ranks, and the same dense part
        whatever the experts.
        """
        if self.token_embedding.weight.is_meta:
            return
        std = self.config.init_std
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
                continue
            for part, parameter in module.named_parameters(prefix=name, recurse=False):
                leaf = part.rpartition(".")[2]
                if leaf.endswith("bias"):
                    parameter.zero_()
                    continue
                stacked = isinstance(module, Experts)
                role = module.stacks[leaf.removesuffix("_weight")][2] if stacked else name.rpartition(".")[2]
                scale = std / math.sqrt(2 * self.config.num_layers) if role == "project" else std
                if stacked:
                    for index in range(len(parameter)):
                        _normal(parameter[index], scale, derive_seed(seed, part, module.first + index))
                else:
                    _normal(parameter, scale, derive_seed(seed, part))


def _normal(tensor: Tensor, std: float, seed: int) -> None:
    """Fill with N(0, std), drawn in fp32 on the CPU so that every device and dtype starts from the same numbers.

    Device and dtype are named because others may be the defaults here: Lightning builds the model under the run's device, and
    under bf16 with `bf16-true`.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    draw = torch.randn(tensor.shape, generator=generator, device="cpu", dtype=torch.float32)
    tensor.copy_(draw * std)


def _extend_mask(token_mask: Tensor | None, cache: KVCache | None, tokens: Tensor) -> Tensor | None:
    """The mask of cached and new positions together, `[B, S]`; None if no position is padding."""
    if cache is None or cache.length == 0 or (token_mask is None and cache.mask is None):
        return token_mask
    new = torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask
    old = cache.mask if cache.mask is not None else new.new_ones(len(tokens), cache.length)
    return torch.cat([old, new], dim=1)


def _positions(
    history: Tensor | None, new: int, cached: int, device: torch.device, documents: Tensor | None = None
) -> Tensor:
    """Position numbers of the new tokens, `[1 or B, T]`: padding is not counted, and every document begins at 0."""
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
