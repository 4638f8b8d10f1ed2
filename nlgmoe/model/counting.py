"""Parameters and FLOPs of a configuration, by formula; only other routers and attentions are built.

Active parameters are those that one token uses: `top_k` experts of each MoE layer instead of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nlgmoe.config import GPTConfig
from nlgmoe.layers.attention import attention_config, build_attention
from nlgmoe.layers.feed_forward import NETWORKS, expert_network
from nlgmoe.layers.moe import moe_layers
from nlgmoe.layers.router import build_router
from nlgmoe.parts import Stack
from nlgmoe.pyramid import moe_blocks


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, by component; `total` and `active` are sums."""

    embedding: int  # tokens, learned positions, and the head if it is not tied
    attention: int
    norms: int
    dense_ffn: int  # feed-forward layers of dense blocks and the shared MLPs of residual blocks
    router: int  # gates, and the mixing coefficients of residual blocks
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


def count_parameters(config: GPTConfig, padded: bool = True) -> ParameterCount:
    """Count the parameters of `GPT(config)`.

    Args:
        padded: count the padding rows of the embedding table (they exist); the paper's sizes leave them out.
    """
    width, layers = config.hidden_size, config.num_layers
    experts = list(moe_blocks(config).values())
    residual, expert = config.moe is not None and config.moe.mlp_type == "residual", expert_parameters(config)
    dense = (layers - len(experts)) * _parameters(network_stacks(config, config.ffn_size), config.bias)
    shared = residual * len(experts) * _parameters(network_stacks(config, config.shared_ffn_size), config.bias)
    top_k, outputs = (config.moe.top_k, config.moe.mix_outputs) if config.moe is not None else (0, 0)
    coefficient = outputs * width + (2 if outputs == 2 else 0)  # only the learned mix has a bias
    tables = (config.padded_vocab_size if padded else config.vocab_size) * (1 if config.tied_embeddings else 2)
    positions = config.seq_len if config.rope_theta is None else 0
    norm = width * (2 if config.norm == "layernorm" and config.bias else 1)
    return ParameterCount(
        embedding=(tables + positions) * width,
        attention=_attention_parameters(config)[0],
        norms=(2 * layers + 1) * norm,
        dense_ffn=dense + shared,
        router=_router_parameters(config) + len(experts) * coefficient,
        experts=expert * sum(experts),
        active_experts=expert * top_k * len(experts),
    )


def expert_parameters(config: GPTConfig) -> int:
    """Return the parameters of one expert; 0 in a dense model."""
    return _parameters(expert_stacks(config), config.bias)


def expert_stacks(config: GPTConfig) -> list[Stack]:
    """Return the matrices of an expert; none in a dense model."""
    if config.moe is None:
        return []
    return list(expert_network(config).stacks(config.hidden_size, config.expert_ffn_size).values())


def _attention_parameters(config: GPTConfig) -> tuple[int, int]:
    """Count the parameters of all attention layers, and of these the weights of matrices; other attentions are built, on meta."""
    if config.attention is not None:
        with torch.device("meta"):
            layers = [build_attention(config, block) for block in range(config.num_layers)]
        sizes = [(parameter.numel(), parameter.dim()) for layer in layers for parameter in layer.parameters()]
        return sum(size for size, _ in sizes), sum(size for size, dim in sizes if dim == 2)
    heads, keys, width = config.num_heads * config.head_size, config.kv_heads * config.head_size, config.hidden_size
    matrices = width * (heads + 2 * keys) + heads * width
    vectors = config.has_qkv_bias * (heads + 2 * keys) + config.bias * width
    vectors += {"head": 2, "projection": config.num_heads + config.kv_heads, None: 0}[config.qk_norm] * config.head_size
    return config.num_layers * (matrices + vectors), config.num_layers * matrices


def network_stacks(config: GPTConfig, ffn_size: int) -> list[Stack]:
    """Return the matrices of a feed-forward layer or shared MLP of that inner width."""
    return list(NETWORKS[config.ffn_network].weights(config.hidden_size, ffn_size).values())


def matmul_flops(stacks: list[Stack]) -> int:
    """Return the FLOPs of the forward pass of a network for one token."""
    return sum(2 * inputs * outputs for inputs, outputs, _ in stacks)


def parameters_of(model: nn.Module) -> tuple[int, int]:
    """Return the parameters of a model that is built: all, experts of other ranks included, and those active for one token."""
    total = active = sum(parameter.numel() for parameter in model.parameters())
    for moe in moe_layers(model):
        size = sum(stack[0].numel() for stack in moe.experts.parameters())
        total += (moe.router.num_experts - moe.experts.count) * size
        active += (moe.top_k - moe.experts.count) * size
    return total, active


def _parameters(stacks: list[Stack], bias: bool) -> int:
    return sum(inputs * outputs + bias * outputs for inputs, outputs, _ in stacks)


def _router_parameters(config: GPTConfig) -> int:
    """Count the parameters of all routers; a user's own is built, on the meta device."""
    blocks = moe_blocks(config)
    if config.moe is None or config.moe.router is None:
        return sum(blocks.values()) * config.hidden_size
    with torch.device("meta"):
        routers = [build_router(config, block) for block in blocks]
    return sum(parameter.numel() for router in routers for parameter in router.parameters())


def flops_per_token(config: GPTConfig, seq_len: int | None = None) -> int:
    """Count the matrix-multiplication FLOPs of one token, forward and backward (3 times the forward), logits included.

    Attention counts the causal half of the score matrix. A multiply-add is two FLOPs; dropped assignments count as computed.
    """
    width, layers = config.hidden_size, config.num_layers
    length = config.seq_len if seq_len is None else seq_len
    experts = list(moe_blocks(config).values())
    scores = config.num_heads * sum(attention_config(config).score_widths(config)) * length  # with sums, causal half
    forward = 2 * _attention_parameters(config)[1] + layers * scores
    forward += (layers - len(experts)) * matmul_flops(network_stacks(config, config.ffn_size))
    if config.moe is not None:
        residual = config.moe.mlp_type == "residual"
        shared = residual * matmul_flops(network_stacks(config, config.shared_ffn_size))
        forward += len(experts) * (config.moe.top_k * matmul_flops(expert_stacks(config)) + shared)
        forward += 2 * _router_parameters(config)
        forward += len(experts) * 2 * config.moe.mix_outputs * width
    forward += 2 * width * config.vocab_size
    return 3 * forward
