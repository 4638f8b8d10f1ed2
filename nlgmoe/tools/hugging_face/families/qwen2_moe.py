"""Qwen2-MoE: biases of queries, keys and values; a shared expert, times a sigmoid."""

from __future__ import annotations

from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.llama import BLOCK, LAYER, shared_mlp
from nlgmoe.tools.hugging_face.families.qwen3_moe import sparse_layers, sparse_settings
from nlgmoe.tools.hugging_face.families.settings import (
    REQUIRED_BY_LAYER,
    decoder_config,
    decoder_settings,
    moe_config,
)

_TABLE = (
    BLOCK | shared_mlp("shared_expert") | {"blocks.#.moe.coefficient.weight": LAYER + "mlp.shared_expert_gate.weight"}
)


def _read(theirs: Any) -> GPTConfig:
    sizes = {
        "expert_ffn_size": theirs.moe_intermediate_size,
        "shared_ffn_size": theirs.shared_expert_intermediate_size,
    }
    mix: dict[str, Any] = {"mlp_type": "residual", "residual_mix": "sigmoid"}
    moe = moe_config(theirs, sparse_layers(theirs), theirs.norm_topk_prob, **sizes, **mix)
    return decoder_config(theirs, qkv_bias=theirs.qkv_bias, moe=moe)


def _write(config: GPTConfig) -> dict[str, Any]:  # no head_dim
    own = {"shared_expert_intermediate_size": config.shared_ffn_size, "qkv_bias": config.has_qkv_bias}
    return decoder_settings(config, **own, **sparse_settings(config))


QWEN2_MOE = Family("qwen2_moe", "Qwen2Moe", _TABLE, _read, _write, REQUIRED_BY_LAYER)
