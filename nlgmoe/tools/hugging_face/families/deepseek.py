"""DeepSeek-V3, DeepSeek-V2 and GLM-4 MoE Lite: multi-head latent attention, and shared experts in every MoE block.

Their rotation turns neighbouring values of a head, ours values i and i + R / 2, so that rows of queries and keys are in another
order; scores do not change. The norms of the latents have epsilon 1e-6, whatever `rms_norm_eps` is.

    family          router                        top-k within groups           first blocks
    deepseek_v3     sigmoid, bias of the choice   the sums of the two highest   `first_k_dense_replace` are dense
    glm4_moe_lite   the same                      the same                      `mlp_layer_types`
    deepseek_v2     softmax, never normalised     the maxima                    `first_k_dense_replace` are dense
"""

from __future__ import annotations

import math
from typing import Any

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.mla import MLAConfig
from nlgmoe.layers.rotary import Yarn
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.llama import BLOCK, LAYER
from nlgmoe.tools.hugging_face.families.rope import UnsupportedError, rope_settings, rope_temperature, yarn_mscale
from nlgmoe.tools.hugging_face.families.settings import REQUIRED, decoder_config, decoder_settings, moe_config, moe_of
from nlgmoe.tools.hugging_face.families.sigmoid_moe import (
    SIGMOID_MOE,
    first_dense,
    shared_fields,
    shared_settings,
    sigmoid_moe,
)
from nlgmoe.tools.hugging_face.families.tensors import Slot, Slots

# ---- rows


def _attention(config: GPTConfig) -> MLAConfig:
    if not isinstance(config.attention, MLAConfig):
        raise UnsupportedError(f"attention={'null' if config.attention is None else type(config.attention).__name__}")
    return config.attention


def _interleaved(first: int, size: int) -> list[int]:
    """Return the rows from `first` on, of which the last `size` are in the order of pairs (i, i + size / 2)."""
    return [*range(first), *(first + pair + half for pair in range(size // 2) for half in (0, size // 2))]


def _query_order(config: GPTConfig) -> list[int]:
    attention = _attention(config)
    order = _interleaved(attention.qk_nope_head_dim, attention.qk_rope_head_dim)
    return [head * len(order) + row for head in range(config.num_heads) for row in order]


def _key_order(config: GPTConfig) -> list[int]:
    attention = _attention(config)
    return _interleaved(attention.kv_lora_rank, attention.qk_rope_head_dim)


_SELF = LAYER + "self_attn."
_TABLE: dict[str, Slots] = (
    BLOCK
    | SIGMOID_MOE
    | {
        "blocks.#.attention.query.weight": Slot(_SELF + "q_proj.weight", order=_query_order),
        "blocks.#.attention.query_down.weight": _SELF + "q_a_proj.weight",
        "blocks.#.attention.query_norm.weight": _SELF + "q_a_layernorm.weight",
        "blocks.#.attention.query_up.weight": Slot(_SELF + "q_b_proj.weight", order=_query_order),
        "blocks.#.attention.key_value_down.weight": Slot(_SELF + "kv_a_proj_with_mqa.weight", order=_key_order),
        "blocks.#.attention.key_value_norm.weight": _SELF + "kv_a_layernorm.weight",
        "blocks.#.attention.key_value.weight": _SELF + "kv_b_proj.weight",
    }
)


# ---- reading


def _decoder(theirs: Any, moe: MoEConfig) -> GPTConfig:
    if theirs.num_key_value_heads != theirs.num_attention_heads:
        raise UnsupportedError(f"num_key_value_heads={theirs.num_key_value_heads}")
    if (temperature := rope_temperature(theirs)) != 1:  # it would scale a part of each product
        raise UnsupportedError(f"attention_factor={temperature} (mscale / mscale_all_dim)")
    widths = theirs.qk_nope_head_dim, theirs.qk_rope_head_dim, theirs.v_head_dim
    attention = MLAConfig(theirs.kv_lora_rank, *widths, theirs.q_lora_rank)
    scale, rope = None, theirs.rope_parameters
    if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim"):
        width = theirs.qk_nope_head_dim + theirs.qk_rope_head_dim
        scale = yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2 / math.sqrt(width)
    heads: dict[str, Any] = {"num_kv_heads": None, "head_dim": None}
    return decoder_config(theirs, attention=attention, attention_scale=scale, **heads, moe=moe)


def _read_v3(theirs: Any) -> GPTConfig:
    return _decoder(theirs, sigmoid_moe(theirs, first_dense(theirs)))


def _read_glm(theirs: Any) -> GPTConfig:
    counts = [theirs.n_routed_experts if kind == "sparse" else 0 for kind in theirs.mlp_layer_types]
    return _decoder(theirs, sigmoid_moe(theirs, counts))


def _read_v2(theirs: Any) -> GPTConfig:
    own = shared_fields(theirs)
    if theirs.topk_method == "greedy":
        own["groups"] = None
    return _decoder(theirs, moe_config(theirs, first_dense(theirs), normalizes=False, **own))


# ---- writing


def _settings(config: GPTConfig, **settings: Any) -> dict[str, Any]:
    attention = _attention(config)
    settings |= {
        "kv_lora_rank": attention.kv_lora_rank,
        "q_lora_rank": attention.q_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }
    return decoder_settings(config, **_rope(config, attention), **shared_settings(config), **settings)


def _rope(config: GPTConfig, attention: MLAConfig) -> dict[str, Any]:
    """Return `rope_parameters`; the scale of the scores is that of YaRN, `mscale`."""
    scaling, scale = config.rotary_scaling, config.attention_scale
    if not isinstance(scaling, Yarn):
        return rope_settings(config)
    mscale = 0.0
    if scale is not None and scaling.factor > 1:
        root = math.sqrt(scale * math.sqrt(attention.score_widths(config)[0]))
        mscale = float(f"{(root - 1) / (0.1 * math.log(scaling.factor)):.13g}")  # 0.707, not 0.70700000000000018
    return rope_settings(config, attention_factor=1.0, mscale=mscale, mscale_all_dim=mscale)


def _write_v3(config: GPTConfig) -> dict[str, Any]:
    return _settings(config, topk_method="noaux_tc", scoring_func="sigmoid", rope_interleave=True)


def _write_glm(config: GPTConfig) -> dict[str, Any]:
    kinds = ["sparse" if count else "dense" for count in experts_per_layer(config)]
    return _write_v3(config) | {"mlp_layer_types": kinds}


def _write_v2(config: GPTConfig) -> dict[str, Any]:
    method = "greedy" if moe_of(config).groups is None else "group_limited_greedy"
    return _settings(config, topk_method=method, scoring_func="softmax")


# `transformers` does not look at all of these; code on the hub does.
_REQUIRED = REQUIRED | {"rope_interleave": (True,), "moe_layer_freq": (1,)}
_SIGMOID = _REQUIRED | {"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",)}
_SOFTMAX = _REQUIRED | {"topk_method": ("greedy", "group_limited_greedy"), "scoring_func": ("softmax",)}

DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3", _TABLE, _read_v3, _write_v3, _SIGMOID)
GLM4_MOE_LITE = Family("glm4_moe_lite", "Glm4MoeLite", _TABLE, _read_glm, _write_glm, _SIGMOID)
DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2", _TABLE, _read_v2, _write_v2, _SOFTMAX)
