"""Parameters and FLOPs of a configuration, counted in its model, which is built on the meta device.

Active parameters are those that one token uses: `top_k` experts of each MoE layer instead of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nlgmoe.config import GPTConfig
from nlgmoe.layers.attention import attention_config
from nlgmoe.layers.moe import moe_layers
from nlgmoe.model.gpt import GPT
from nlgmoe.roles import component_of

FIELDS = {
    "embeddings": "embedding",
    "ffn": "dense_ffn",
}  # of `ParameterCount`, if they are not named like the component


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, by component; `total` and `active` are sums."""

    embedding: int  # tokens, learned positions, and the head if it is not tied
    attention: int
    norms: int
    dense_ffn: int  # feed-forward layers of dense blocks; shared experts and mixing coefficients of residual blocks
    router: int
    experts: int
    active_experts: int

    @property
    def total(self) -> int:
        """All parameters; the tied unembedding counts once."""
        return self.embedding + self.attention + self.norms + self.dense_ffn + self.router + self.experts

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return self.total - self.experts + self.active_experts


def count_parameters(config: GPTConfig) -> ParameterCount:
    """Count the parameters of `GPT(config)`, with the padding rows of the embedding table."""
    sizes: Counter[str] = Counter()
    for component, _, parameter in _parameters(config):
        sizes[component] += parameter.numel()
        if component == "experts":
            sizes["active_experts"] += _active(parameter, config)
    return ParameterCount(**{name: sizes[name] for name in ParameterCount.__dataclass_fields__})


def parameters_of(model: nn.Module) -> tuple[int, int]:
    """Return the parameters of a model that is built: all, experts of other ranks included, and those active for one token."""
    total = active = sum(parameter.numel() for parameter in model.parameters())
    for moe in moe_layers(model):
        size = sum(stack[0].numel() for stack in moe.experts.parameters())
        total += (moe.router.num_experts - moe.experts.count) * size
        active += (moe.top_k - moe.experts.count) * size
    return total, active


def flops_per_token(config: GPTConfig, seq_len: int | None = None) -> int:
    """Count the matrix-multiplication FLOPs of one token, forward and backward (3 times the forward), logits included.

    Attention counts the causal half of the score matrix. A multiply-add is two FLOPs; dropped assignments count as computed.
    """
    length = config.seq_len if seq_len is None else seq_len
    matrices = config.hidden_size * config.vocab_size  # the head's
    for component, name, parameter in _parameters(config):
        if component != "embedding" and parameter.dim() > 1 and not name.endswith("bias"):
            matrices += _active(parameter, config) if component == "experts" else parameter.numel()
    scores = config.num_heads * sum(attention_config(config).score_widths(config)) * length  # with sums, causal half
    return 3 * (2 * matrices + config.num_layers * scores)


def _parameters(config: GPTConfig) -> Iterator[tuple[str, str, Tensor]]:
    """Yield component, name and parameter of each parameter of `GPT(config)`."""
    with torch.device("meta"):
        model = GPT(config)
    for name, parameter in model.named_parameters():
        component = component_of(name)
        yield FIELDS.get(component, component), name, parameter


def _active(stack: Tensor, config: GPTConfig) -> int:
    """Return how many values of a stack of all experts, `[E, ...]`, a token uses."""
    assert config.moe is not None
    return stack[0].numel() * config.moe.top_k
