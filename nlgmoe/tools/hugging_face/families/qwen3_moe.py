"""Qwen3-MoE: blocks may be dense, and each head's query and key are normalised."""

from __future__ import annotations

from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.llama import BLOCK
from nlgmoe.tools.hugging_face.families.settings import (
    decoder_config,
    decoder_settings,
    moe_config,
    moe_of,
    moe_settings,
)


def sparse_layers(theirs: Any) -> list[int]:
    """Return the number of experts of every block, of `decoder_sparse_step` and `mlp_only_layers`."""
    return [
        0 if layer in theirs.mlp_only_layers or (layer + 1) % theirs.decoder_sparse_step else theirs.num_experts
        for layer in range(theirs.num_hidden_layers)
    ]


def sparse_settings(config: GPTConfig) -> dict[str, Any]:
    """Return the settings of a mixture with dense blocks, and with a width of the experts' own."""
    return moe_settings(config) | {
        "norm_topk_prob": moe_of(config).normalizes,
        "moe_intermediate_size": config.expert_ffn_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, count in enumerate(experts_per_layer(config)) if not count],
    }


def _read(theirs: Any) -> GPTConfig:
    size = theirs.moe_intermediate_size
    moe = moe_config(theirs, sparse_layers(theirs), theirs.norm_topk_prob, expert_ffn_size=size)
    return decoder_config(theirs, qk_norm="head", moe=moe)


def _write(config: GPTConfig) -> dict[str, Any]:
    return decoder_settings(config, head_dim=config.head_size, **sparse_settings(config))


QWEN3_MOE = Family("qwen3_moe", "Qwen3Moe", BLOCK, _read, _write)
