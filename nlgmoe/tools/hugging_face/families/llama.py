"""Families with Llama's block, dense or with a softmax router; `BLOCK` has the names of tensors that most families share.

    llama, qwen3                   dense; Qwen3 normalises each head's query and key
    mixtral                        every block MoE, weights of a token's experts always normalised
    olmoe                          every block MoE, queries and keys normalised as a whole; weights may be normalised
    qwen3_moe                      blocks may be dense; each head's query and key are normalised
    qwen2_moe                      blocks may be dense; biases of queries, keys and values; a shared expert, times a sigmoid
    granite                        dense, with four scales
    granitemoe, granitemoeshared   the same, but every block MoE, weights always normalised; the second with a shared expert

Granite's scales:

    x = embedding_multiplier * E[token]        x = x + residual_multiplier * branch(norm(x))
    scores = attention_multiplier * q k^T      logits = head(norm(x)) / logits_scaling
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.rotary import Yarn
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.settings import (
    UnsupportedError,
    decoder_config,
    decoder_settings,
    moe_config,
    moe_of,
    moe_settings,
    rope_settings,
    rope_temperature,
    yarn_mscale,
)
from nlgmoe.tools.hugging_face.families.tensors import Slot, Slots, key_rows, query_rows

LAYER = "model.layers.{}."


def qkv(leaf: str) -> list[Slot]:
    """Return the slots of `attention.qkv`; `leaf` is weight or bias."""
    rows = {"q": query_rows, "k": key_rows, "v": key_rows}
    return [Slot(f"{LAYER}self_attn.{part}_proj.{leaf}", rows=count) for part, count in rows.items()]


def shared_expert(name: str) -> dict[str, Slots]:
    """Return the slots of a residual layer's shared expert, which is `mlp.{name}` in the files."""
    parts = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return {
        f"blocks.#.moe.shared_expert.{ours}.weight": f"{LAYER}mlp.{name}.{theirs}.weight"
        for ours, theirs in parts.items()
    }


BLOCK: dict[str, Slots] = {
    "blocks.#.attention_norm.weight": LAYER + "input_layernorm.weight",
    "blocks.#.attention.qkv.weight": qkv("weight"),
    "blocks.#.attention.qkv.bias": qkv("bias"),
    "blocks.#.attention.output.weight": LAYER + "self_attn.o_proj.weight",
    "blocks.#.attention.query_norm.weight": LAYER + "self_attn.q_norm.weight",
    "blocks.#.attention.key_norm.weight": LAYER + "self_attn.k_norm.weight",
    "blocks.#.ffn_norm.weight": LAYER + "post_attention_layernorm.weight",
    "blocks.#.ffn.gate.weight": LAYER + "mlp.gate_proj.weight",
    "blocks.#.ffn.up.weight": LAYER + "mlp.up_proj.weight",
    "blocks.#.ffn.down.weight": LAYER + "mlp.down_proj.weight",
    "blocks.#.moe.router.weight": LAYER + "mlp.gate.weight",
    "blocks.#.moe.experts.#.gate_weight": LAYER + "mlp.experts.{}.gate_proj.weight",
    "blocks.#.moe.experts.#.up_weight": LAYER + "mlp.experts.{}.up_proj.weight",
    "blocks.#.moe.experts.#.down_weight": LAYER + "mlp.experts.{}.down_proj.weight",
    "token_embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


# ---- Llama, Qwen3, Mixtral, OLMoE

MIXTRAL_TABLE = BLOCK | {
    "blocks.#.moe.router.weight": LAYER + "block_sparse_moe.gate.weight",
    "blocks.#.moe.experts.#.gate_weight": LAYER + "block_sparse_moe.experts.{}.w1.weight",
    "blocks.#.moe.experts.#.up_weight": LAYER + "block_sparse_moe.experts.{}.w3.weight",
    "blocks.#.moe.experts.#.down_weight": LAYER + "block_sparse_moe.experts.{}.w2.weight",
}


def _write_dense(config: GPTConfig) -> dict[str, Any]:
    return decoder_settings(config, head_dim=config.head_size)


def _read_mixtral(theirs: Any) -> GPTConfig:
    return decoder_config(theirs, moe=moe_config(theirs, theirs.num_local_experts, normalizes=True))


def _write_mixtral(config: GPTConfig) -> dict[str, Any]:
    sizes = {"intermediate_size": config.expert_ffn_size, "head_dim": config.head_size}
    return decoder_settings(config, **sizes, **moe_settings(config))


def _read_olmoe(theirs: Any) -> GPTConfig:
    moe = moe_config(theirs, theirs.num_experts, theirs.norm_topk_prob)
    return decoder_config(theirs, qk_norm="projection", moe=moe)


def _write_olmoe(config: GPTConfig) -> dict[str, Any]:  # no head_dim
    sizes = {"intermediate_size": config.expert_ffn_size, "norm_topk_prob": moe_of(config).normalizes}
    return decoder_settings(config, **sizes, **moe_settings(config))


LLAMA = Family("llama", "Llama", BLOCK, decoder_config, _write_dense)
QWEN3 = Family("qwen3", "Qwen3", BLOCK, lambda theirs: decoder_config(theirs, qk_norm="head"), _write_dense)
MIXTRAL = Family("mixtral", "Mixtral", MIXTRAL_TABLE, _read_mixtral, _write_mixtral)
OLMOE = Family("olmoe", "Olmoe", BLOCK, _read_olmoe, _write_olmoe)


# ---- Qwen2-MoE, Qwen3-MoE

_QWEN2_TABLE = BLOCK | shared_expert("shared_expert")
_QWEN2_TABLE["blocks.#.moe.coefficient.weight"] = LAYER + "mlp.shared_expert_gate.weight"


def _qwen_moe(theirs: Any, **shared: Any) -> MoEConfig:
    """Read a mixture with dense blocks, and with a width of the experts' own."""
    counts = [
        0 if layer in theirs.mlp_only_layers or (layer + 1) % theirs.decoder_sparse_step else theirs.num_experts
        for layer in range(theirs.num_hidden_layers)
    ]
    return moe_config(theirs, counts, theirs.norm_topk_prob, expert_ffn_size=theirs.moe_intermediate_size, **shared)


def _qwen_settings(config: GPTConfig) -> dict[str, Any]:
    return moe_settings(config) | {
        "norm_topk_prob": moe_of(config).normalizes,
        "moe_intermediate_size": config.expert_ffn_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, count in enumerate(experts_per_layer(config)) if not count],
    }


def _read_qwen2(theirs: Any) -> GPTConfig:
    size = theirs.shared_expert_intermediate_size
    moe = _qwen_moe(theirs, mlp_type="residual", residual_mix="sigmoid", shared_ffn_size=size)
    return decoder_config(theirs, qkv_bias=theirs.qkv_bias, moe=moe)


def _write_qwen2(config: GPTConfig) -> dict[str, Any]:  # no head_dim
    own = {"shared_expert_intermediate_size": config.shared_ffn_size, "qkv_bias": config.has_qkv_bias}
    return decoder_settings(config, **own, **_qwen_settings(config))


def _read_qwen3(theirs: Any) -> GPTConfig:
    return decoder_config(theirs, qk_norm="head", moe=_qwen_moe(theirs))


def _write_qwen3(config: GPTConfig) -> dict[str, Any]:
    return decoder_settings(config, head_dim=config.head_size, **_qwen_settings(config))


QWEN2_MOE = Family("qwen2_moe", "Qwen2Moe", _QWEN2_TABLE, _read_qwen2, _write_qwen2)
QWEN3_MOE = Family("qwen3_moe", "Qwen3Moe", BLOCK, _read_qwen3, _write_qwen3)


# ---- Granite

_EXPERTS, _SHARED = LAYER + "block_sparse_moe.", LAYER + "shared_mlp."
_GRANITE_TABLE = BLOCK | {
    "blocks.#.moe.router.weight": _EXPERTS + "router.layer.weight",
    "blocks.#.moe.experts.#.gate_weight": _EXPERTS + "input_linear.weight",
    "blocks.#.moe.experts.#.up_weight": Slot(_EXPERTS + "input_linear.weight", part=1),
    "blocks.#.moe.experts.#.down_weight": _EXPERTS + "output_linear.weight",
    "blocks.#.moe.shared_expert.gate.weight": _SHARED + "input_linear.weight",
    "blocks.#.moe.shared_expert.up.weight": Slot(_SHARED + "input_linear.weight", part=1),
    "blocks.#.moe.shared_expert.down.weight": _SHARED + "output_linear.weight",
}


def _read_granite(theirs: Any, moe: MoEConfig | None = None) -> GPTConfig:
    return decoder_config(
        theirs,
        attention_scale=theirs.attention_multiplier * rope_temperature(theirs) ** 2,
        embedding_scale=float(theirs.embedding_multiplier),
        residual_scale=float(theirs.residual_multiplier),
        logit_scale=1 / theirs.logits_scaling,
        moe=moe,
    )


def _read_granite_moe(theirs: Any, **shared: Any) -> GPTConfig:
    return _read_granite(theirs, moe_config(theirs, theirs.num_local_experts, normalizes=True, **shared))


def _read_granite_shared(theirs: Any) -> GPTConfig:
    size = theirs.shared_intermediate_size
    if not size:
        raise UnsupportedError(f"shared_intermediate_size={size}")
    return _read_granite_moe(theirs, mlp_type="residual", residual_mix="sum", shared_ffn_size=size)


def _write_granite(config: GPTConfig, **settings: Any) -> dict[str, Any]:
    scaling, width = config.rotary_scaling, config.head_size
    factor = yarn_mscale(scaling.factor) ** 2 if isinstance(scaling, Yarn) else 1.0  # of products, by the temperature
    return decoder_settings(
        config,
        head_dim=width,
        attention_multiplier=(config.attention_scale or width**-0.5) / factor,
        embedding_multiplier=config.embedding_scale,
        residual_multiplier=config.residual_scale,
        logits_scaling=1 / config.logit_scale,
        **rope_settings(replace(config, attention_scale=factor * width**-0.5)),
        **settings,
    )


def _write_granite_moe(config: GPTConfig, **shared: Any) -> dict[str, Any]:
    return _write_granite(config, intermediate_size=config.expert_ffn_size, **moe_settings(config), **shared)


def _write_granite_shared(config: GPTConfig) -> dict[str, Any]:
    return _write_granite_moe(config, shared_intermediate_size=config.shared_ffn_size)


GRANITE = Family("granite", "Granite", BLOCK, _read_granite, _write_granite)
GRANITE_MOE = Family("granitemoe", "GraniteMoe", _GRANITE_TABLE, _read_granite_moe, _write_granite_moe)
GRANITE_MOE_SHARED = Family(
    "granitemoeshared", "GraniteMoeShared", _GRANITE_TABLE, _read_granite_shared, _write_granite_shared
)
