"""The decoder: embeddings, blocks, final norm, the head, and their initial weights.

Letters in shape comments: B sequences, T new positions, H hidden size, V vocabulary, P rows of the padded table.
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
from nlgmoe.layers.attention import AttentionContext, KVCache, build_attention, build_norm
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.feed_forward import FeedForward
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.routing import Routing, RoutingContext
from nlgmoe.pyramid import ExpertPlacement, experts_at
from nlgmoe.roles import role_of
from nlgmoe.seeding import draw_normal, key_of_draws

NoiseKey = tuple[int, ...]


@dataclass(frozen=True)
class GPTOutput:
    """The output for a batch.

    Attributes:
        hidden: `[B, T, H]`, after the final norm, times `logit_scale`; the input of `GPT.logits` and of the losses.
        routings: one `Routing` per MoE block, from the first to the last.
    """

    hidden: Tensor
    routings: list[Routing]


class Block(nn.Module):
    """One transformer block.

    x ── norm ── attention ── dropout ──(+)── norm ── FFN or MoE ── dropout ──(+)── x
    └──────────────────────────────────┘ └───────────────────────────────────┘

    The output of each branch is multiplied by `residual_scale`.
    """

    def __init__(self, config: GPTConfig, block: int, placement: ExpertPlacement | None = None) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = build_attention(config, block)
        self.ffn_norm = build_norm(config)
        self.moe = MoELayer(config, block, placement) if experts_at(config, block) else None
        self.ffn = None if self.moe is not None else FeedForward(config, config.ffn_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.scale = config.residual_scale

    def forward(self, x: Tensor, attention: AttentionContext, routing: RoutingContext) -> tuple[Tensor, Routing | None]:
        """Apply the block, `[B, T, H] -> [B, T, H]`. Returns the routing too if the block is MoE."""
        x = self.attend(x, attention)
        if self.moe is None:
            return self.feed_forward(x), None
        h, chosen = self.moe(self.ffn_norm(x), routing)
        return self._add(x, h), chosen

    def attend(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Apply the first half of the block."""
        return self._add(x, self.attention(self.attention_norm(x), context))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Apply the second half of a block without experts."""
        assert self.ffn is not None
        return self._add(x, self.ffn(self.ffn_norm(x)))

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        branch = self.dropout(branch)
        return x + (branch if self.scale == 1 else branch * self.scale)


class GPT(nn.Module):
    """The whole model.

    Attributes:
        block_class: class of the blocks.

    Args:
        seed: seed of the initial weights (`initialise`).
        activation_checkpointing: keep only each block's input for the backward pass, and recompute the rest.
        placements: the experts that this rank holds, by block number; a block that is not named holds all of its experts.
    """

    block_class: type[Block] = Block

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
        learned = config.rope_theta is None
        self.position_embedding = nn.Embedding(config.seq_len, config.hidden_size) if learned else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        build = self.block_class
        self.blocks = nn.ModuleList(build(config, block, placements.get(block)) for block in range(config.num_layers))
        self.final_norm = build_norm(config)
        tied = config.tied_embeddings
        self.head = None if tied else nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        if not self.token_embedding.weight.is_meta:
            initialise(self, config, seed)

    def forward(
        self,
        tokens: Tensor,
        token_mask: Tensor | None = None,
        cache: KVCache | None = None,
        noise_key: NoiseKey | None = None,
        documents: Tensor | None = None,
        embedded: Tensor | None = None,
    ) -> GPTOutput:
        """Compute hidden states and routings.

        Args:
            tokens: `[B, T]` int64.
            token_mask: `[B, T]` bool, False at padding, at any place: other tokens do not attend to it, positions do not count
                it, and it takes no capacity of an expert. None: no padding.
            cache: keys and values of earlier positions, to which this call appends those of `tokens`.
            noise_key: (seed, step, micro-batch index) of the routing's random draws; None: torch's global generator.
            documents: `[B, T]` int64, the document of each position; a document is contiguous. Attention ends at its borders,
                and positions count from its beginning; capacity and losses of routers ignore it. None: one document.
            embedded: `[B, T, H]`, replaces the embeddings of `tokens`; only the shape of `tokens` is then used.

        Raises:
            ValueError: a sequence or document is longer than `config.seq_len`, padding not counted.
        """
        attention = AttentionContext.build(self.config, tokens, token_mask, documents, cache)
        ids = tokens if embedded is None else None
        context = RoutingContext(ids, token_mask, noise_key, attention.positions)
        x = self.token_embedding(tokens) if embedded is None else embedded
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.position_embedding is not None:
            x = x + self.position_embedding(attention.positions)
        return self.run_blocks(0, self.dropout(x), attention, context)

    def run_blocks(self, first: int, x: Tensor, attention: AttentionContext, context: RoutingContext) -> GPTOutput:
        """Apply the blocks from number `first` on, and the final norm, to `x`, `[B, T, H]`."""
        routings = []
        for block in self.blocks[first:]:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, routing = checkpoint(block, x, attention, context, use_reentrant=False)
            else:
                x, routing = block(x, attention, context)
            if routing is not None:
                routings.append(routing)
        x = self.final_norm(x)
        return GPTOutput(x if self.config.logit_scale == 1 else x * self.config.logit_scale, routings)

    @property
    def unembedding(self) -> Tensor:
        """The head's matrix, `[P, H]`: the token embedding, or its own.

        Rows from `config.vocab_size` on are padding, without token, logit and gradient. Products include them, because P is a
        multiple of `config.vocab_size_multiple`: fast GEMMs need rows of logits aligned to 16 bytes, which rows of 50,257 values
        are not.
        """
        return self.token_embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits, `[..., H] -> [..., V]`. Training uses `layers/losses.py` instead, which never holds them all."""
        return (hidden @ self.unembedding.to(hidden.dtype).t())[..., : self.config.vocab_size]


@torch.no_grad()
def initialise(model: nn.Module, config: GPTConfig, seed: int) -> None:
    """Draw the initial value of every parameter by its role (`roles.py`).

    Each tensor, and each expert of a stack, has its own generator, seeded by its name: ranks that hold other experts draw the
    same values, and dense components do not depend on the experts.
    """
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            role = role_of(name, module)
            if role in ("scale", "bias"):
                parameter.fill_(1 if role == "scale" else 0)
                continue
            key = key_of_draws(name)
            std = getattr(module, "init_std", None) or config.init_std  # a router may have one of its own
            if role == "output":
                std /= math.sqrt(2 * config.num_layers)
            if isinstance(module, Experts):
                for index, expert in enumerate(parameter):
                    expert.copy_(draw_normal(expert.shape, seed, key, module.first + index) * std)
            else:
                parameter.copy_(draw_normal(parameter.shape, seed, key) * std)
