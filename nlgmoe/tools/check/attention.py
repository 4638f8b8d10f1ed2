"""An attention layer under test: what it must not see, and the cache, types and recomputation.

Letters: B sequences, T positions, H hidden size.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nlgmoe.config import GPTConfig
from nlgmoe.layers.attention import AttentionContext, KVCache, MultiHead, attention_config, build_attention
from nlgmoe.layers.mla import MLAConfig
from nlgmoe.parts import AttentionConfig
from nlgmoe.tools.check.layer import Batch, Failed, Output, Target, gradients, require_close, trained
from nlgmoe.validation import require

TOKENS = 48  # of a sequence
BLOCKS = 4  # at most; an attention may differ from block to block
ATTENTIONS: dict[str, AttentionConfig] = {"multi-head": MultiHead(), "mla": MLAConfig(12, 4, 4, 6, q_lora_rank=10)}
SHARED_KEYS: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 6, "rotary_dim": 4, "qk_norm": "head"}


@dataclass(frozen=True)
class AttentionLayer(Target):
    """The attention of some blocks of a model without experts and dropout, each adding to the residual stream."""

    config: GPTConfig = GPTConfig(1)  # noqa: RUF009 (frozen)

    @property
    def sizes(self) -> str:
        return f"attention of {self.config.num_layers} blocks, {self.config.num_heads} heads, width {self.hidden_size}"

    def build(self) -> nn.Module:
        return nn.ModuleList(build_attention(self.config, block) for block in range(self.config.num_layers))

    def forward(self, module: nn.Module, batch: Batch) -> Output:
        return Output(self.attend(module, batch))

    def without_dispatch(self, module: nn.Module, batch: Batch) -> Output:
        """See `Target`: without a mask, which leaves `AttentionContext.visible` None, and with one."""
        ones = torch.ones_like(batch.tokens)
        masked = replace(batch, mask=ones.bool(), documents=ones)
        return Output(self.attend(module, batch) + self.attend(module, masked))

    def attend(self, module: nn.Module, batch: Batch, cache: KVCache | None = None, recomputed: bool = False) -> Tensor:
        """Apply the layers, `[B, T, H] -> [B, T, H]`; `recomputed` by activation checkpointing."""
        assert isinstance(module, nn.ModuleList)
        context = AttentionContext.build(self.config, batch.tokens, batch.mask, batch.documents, cache)
        x = batch.x
        for layer in module:
            y = checkpoint(layer, x, context, use_reentrant=False) if recomputed else layer(x, context)
            if not isinstance(y, Tensor) or y.shape != x.shape:
                form = list(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
                raise Failed(f"forward returns {form} for x of {list(x.shape)}; return a tensor of that shape")
            if y.dtype != x.dtype and not torch.is_autocast_enabled("cpu"):
                raise Failed(f"forward returns {y.dtype} for x of {x.dtype}; return the type of x")
            x = x + y
        return x


def attention_layer(config: GPTConfig, name: str) -> AttentionLayer:
    """Return the attention of a configuration, with few heads of their own width."""
    plain = replace(
        config,
        seq_len=64,
        num_layers=min(config.num_layers, BLOCKS),
        moe=None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    keys = None if plain.num_kv_heads is None else min(plain.num_kv_heads, 2)
    heads = 2 if keys is None else keys * min(2, plain.num_heads // plain.kv_heads)
    width = 16 if plain.head_dim is not None else heads * plain.head_size
    with suppress(ValueError):  # an attention may need the heads that it has
        plain = replace(plain, hidden_size=width, num_heads=heads, num_kv_heads=keys)
    return AttentionLayer(name, plain.hidden_size, config=plain)


def layers_of_attention(name: str, part: AttentionConfig) -> list[AttentionLayer]:
    """Return layers with learned and with rotary positions, as far as the attention takes them; with shared keys if it can."""
    rotary = {"rope_theta": 1e4} | (SHARED_KEYS if part.reads_fields.issuperset(SHARED_KEYS) else {})
    layers: list[AttentionLayer] = []
    refusal: ValueError | None = None
    for positions, settings in (("learned", {}), ("rotary", rotary)):
        try:
            config = GPTConfig(512, 64, BLOCKS, 16, 4, attention=part, **settings)
            layer = AttentionLayer(f"{name}, {positions} positions", config=config)
            layer.build()
            layers.append(layer)
        except ValueError as error:
            refusal = error
    require(bool(layers), f"{name} takes no model of width 16 with 4 heads: {refusal}")
    return layers


@torch.no_grad()
def cache_changes_nothing(layer: AttentionLayer) -> str:
    """Compare sequences in pieces with whole ones; the cache reorders them behind the first piece (`KVCache.select`)."""
    module, mask = layer.make(training=False), torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, :5] = False
    pieces = {"token by token": [1] * TOKENS, "in pieces": [7, 1, 16, 2, TOKENS - 26], "at once": [TOKENS]}
    for padded in (False, True):
        batch = replace(Batch.random(layer, 2, TOKENS), mask=mask if padded else None)
        whole = layer.run(module, batch).y
        for name, sizes in pieces.items():
            cache, order, outputs = KVCache(TOKENS), [0, 1], []
            for size in sizes:
                piece = batch[:, cache.length : cache.length + size][order]
                outputs.append(layer.attend(module, piece, cache)[order])
                if len(outputs) == 1:
                    order = [1, 0]
                    cache.select(torch.tensor(order))
            behind = " behind padding" * padded
            require_close(f"{name} with a cache{behind}", torch.cat(outputs, dim=1)[mask], whole[mask], 1e-5)
    return f"{', '.join(pieces)}, and behind padding"


def padding_is_not_seen(layer: AttentionLayer) -> str:
    """Compare the outputs of real tokens with those of a sequence without padding; gradients are finite."""
    mask = torch.ones(3, TOKENS, dtype=torch.bool)
    mask[0, :9] = False
    mask[1, -7:] = False
    mask[2, 11:30] = False
    module, batch = layer.make(training=False), replace(Batch.random(layer, 3, TOKENS), mask=mask).tracked()
    y = _compare_parts(layer, module, batch, mask.long() - 1, "real tokens")
    y[mask].square().sum().backward()
    assert batch.x.grad is not None
    if not bool(batch.x.grad.isfinite().all()):
        raise Failed("a gradient is not finite: the output of a padded token must be finite, whatever it is")
    return "at the left, at the right, and in the middle"


def documents_are_apart(layer: AttentionLayer) -> str:
    """Compare the outputs of each document of a sequence with those of the document alone."""
    documents = torch.stack([torch.arange(TOKENS) >= border for border in (5, 20, 1)]).long()
    documents[0, 6:] += 1  # one token alone
    batch = replace(Batch.random(layer, 3, TOKENS), documents=documents)
    _compare_parts(layer, layer.make(training=False), batch, documents, "a document")
    return "documents of 1 to 47 tokens"


def _compare_parts(layer: AttentionLayer, module: nn.Module, batch: Batch, parts: Tensor, what: str) -> Tensor:
    """Compare the output at each part of each sequence, numbered from 0 in `parts` `[B, T]`, with that of the part alone."""
    y = layer.run(module, batch).y
    for row, numbers in enumerate(parts):
        for number in range(int(numbers.max()) + 1):
            place = numbers == number
            with torch.no_grad():
                alone = layer.run(module, Batch(batch.x[row, place][None], batch.tokens[row, place][None])).y[0]
            require_close(f"outputs of {what}, against {what} alone", y[row, place], alone, 1e-5)
    return y


def autocast_is_close(layer: AttentionLayer) -> str:
    """Compare output and gradients under autocast with those in fp32; gradients have the type of the weights."""
    module, batch = layer.make(torch.float32), Batch.random(layer, 4, 16, dtype=torch.float32)
    expected = layer.run(module, batch).y
    for dtype, tolerance in ((torch.bfloat16, 6e-2), (torch.float16, 1e-2)):
        with torch.autocast("cpu", dtype):
            y = layer.run(module, batch).y
        if not bool(y.isfinite().all()):
            raise Failed(f"the output is not finite under autocast to {dtype}")
        require_close(f"the output under autocast to {dtype}", y, expected, tolerance)
        for name, gradient in gradients(trained(module), y.float().square().mean()).items():
            if gradient.dtype != torch.float32 or not bool(gradient.isfinite().all()):
                raise Failed(f"the gradient of {name} under autocast to {dtype} is {gradient.dtype}, or not finite")
    return "fp32 under autocast to bf16 and fp16"


def recomputation_changes_nothing(layer: AttentionLayer) -> str:
    """Compare gradients with activation checkpointing and without it, to the bit, and with dropout if the layer reads it."""
    reads = "attention_dropout" in attention_config(layer.config).reads_fields
    for dropout in (0.0, 0.5)[: 1 + reads]:
        used = replace(layer, config=replace(layer.config, attention_dropout=dropout))
        module, results = used.make(torch.float32), []
        for recomputed in (False, True):
            batch = Batch.random(used, 2, 16, dtype=torch.float32).tracked()
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                y = used.attend(module, batch, recomputed=recomputed)
                results.append(gradients(trained(module) | {"the input": batch.x}, y.square().sum()))
        if different := [name for name, value in results[0].items() if not torch.equal(value, results[1][name])]:
            raise Failed(f"with attention_dropout={dropout:g} the gradient of {different[0]} differs")
    return "without dropout" + ", and with it" * reads
