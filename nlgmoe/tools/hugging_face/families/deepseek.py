"""DeepSeek's families, and those that took over its mixtures.

    family          block                                    router                        first blocks
    deepseek_v3     latent attention                         sigmoid, groups               `first_k_dense_replace` are dense
    glm4_moe_lite   the same (GLM-4.7-Flash)                 the same                      `mlp_layer_types`
    deepseek_v2     the same                                 softmax, never normalised     `first_k_dense_replace` are dense
    dots1           each head's query and key normalised     as deepseek_v3                the same
    glm4_moe        half of each head turns (GLM-4.5)        the same                      the same
    minimax_m2      the same; queries and keys normalised    sigmoid, always normalised    every block is MoE
                    as a whole

The sigmoid router has a bias on the choice. Groups score by the sum of their two highest experts; DeepSeek-V2's by the maximum.
All but MiniMax-M2 have shared experts, whose outputs are added: they are one MLP, `n_shared_experts` times as wide as an expert.

The rotation of latent attention turns neighbouring values of a head, ours values i and i + R / 2, so that rows of queries and
keys are in another order; scores do not change. The norms of the latents have epsilon 1e-6, whatever `rms_norm_eps` is.
"""

from __future__ import annotations

import math
from typing import Any

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.mla import MLAConfig
from nlgmoe.layers.rotary import Yarn
from nlgmoe.layers.routers.sigmoid import SigmoidRouterConfig
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.llama import BLOCK, LAYER, MIXTRAL_TABLE, shared_expert
from nlgmoe.tools.hugging_face.families.settings import (
    REQUIRED,
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
from nlgmoe.tools.hugging_face.families.tensors import Slot, Slots

# ---- mixtures

_SIGMOID_MOE: dict[str, Slots] = {
    "blocks.#.moe.router.bias": LAYER + "mlp.gate.e_score_correction_bias",
    **shared_expert("shared_experts"),
}


def _first_dense(theirs: Any) -> list[int]:
    """Return the number of experts of every block, of `first_k_dense_replace`."""
    dense = theirs.first_k_dense_replace
    return [0 if layer < dense else theirs.n_routed_experts for layer in range(theirs.num_hidden_layers)]


def _shared_fields(theirs: Any) -> dict[str, Any]:
    """Return the fields of `MoEConfig` for widths, shared experts, groups, and the scale of the weights."""
    if not theirs.n_shared_experts:
        raise UnsupportedError(f"n_shared_experts={theirs.n_shared_experts}")
    size = theirs.moe_intermediate_size
    return {
        "expert_ffn_size": size,
        "mlp_type": "residual",
        "residual_mix": "sum",
        "shared_ffn_size": size * theirs.n_shared_experts,
        "groups": None if theirs.n_group in (None, 1) else [theirs.n_group, theirs.topk_group],
        "gate_scale": float(theirs.routed_scaling_factor),
    }


def _sigmoid_moe(theirs: Any, counts: list[int] | None = None) -> MoEConfig:
    """Read a mixture with the sigmoid router; `counts` has the experts of each block, by default those of `_first_dense`."""
    own = _shared_fields(theirs)
    router = SigmoidRouterConfig()
    return moe_config(theirs, counts or _first_dense(theirs), theirs.norm_topk_prob, router=router, **own)


def _shared_settings(config: GPTConfig) -> dict[str, Any]:
    """Return the settings of a mixture with shared experts, the inverse of `_shared_fields` and `_first_dense`."""
    moe, counts, size = moe_of(config), experts_per_layer(config), config.expert_ffn_size
    number, chosen = moe.groups or (1, 1)
    return moe_settings(config) | {
        "n_routed_experts": max(counts),
        "n_shared_experts": max(config.shared_ffn_size // size, 1),
        "moe_intermediate_size": size,
        "first_k_dense_replace": next(layer for layer, count in enumerate(counts) if count),
        "n_group": number,
        "topk_group": chosen,
        "norm_topk_prob": moe.normalizes,
        "routed_scaling_factor": moe.gate_scale,
    }


# ---- dots.llm1, GLM-4.5, MiniMax-M2


def _read_dots(theirs: Any) -> GPTConfig:
    return decoder_config(theirs, qk_norm="head", moe=_sigmoid_moe(theirs))


def _write_dots(config: GPTConfig) -> dict[str, Any]:
    own = {"head_dim": config.head_size, "sliding_window": None, "max_window_layers": config.num_layers}
    return decoder_settings(config, **own, **_shared_settings(config))


def _read_glm4(theirs: Any) -> GPTConfig:
    own = {"qkv_bias": theirs.attention_bias, "qk_norm": "head" if theirs.use_qk_norm else None}
    return decoder_config(theirs, partial=True, **own, moe=_sigmoid_moe(theirs))


def _write_glm4(config: GPTConfig) -> dict[str, Any]:
    own = {
        "attention_bias": config.has_qkv_bias,  # of queries, keys and values alone
        "use_qk_norm": config.qk_norm is not None,
        "num_nextn_predict_layers": 0,
    }
    return decoder_settings(config, **own, **_partial_rope(config), **_shared_settings(config))


def _partial_rope(config: GPTConfig) -> dict[str, Any]:
    share = config.rotary_size / config.head_size  # GLM's default is 0.5
    return {"head_dim": config.head_size, **rope_settings(config, partial_rotary_factor=share)}


# `transformers` does not look at these; files on the hub and other programs have them.
_MINIMAX = {"scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer"}
_MINIMAX |= {"shared_intermediate_size": 0}
_MINIMAX_TABLE = MIXTRAL_TABLE | {"blocks.#.moe.router.bias": LAYER + "block_sparse_moe.e_score_correction_bias"}


def _read_minimax(theirs: Any) -> GPTConfig:
    moe = moe_config(theirs, theirs.num_local_experts, normalizes=True, router=SigmoidRouterConfig())
    return decoder_config(theirs, partial=True, qk_norm="projection", moe=moe)


def _write_minimax(config: GPTConfig) -> dict[str, Any]:
    # `rotary_dim` is for other programs.
    sizes = {"intermediate_size": config.expert_ffn_size, "rotary_dim": config.rotary_size}
    return decoder_settings(config, **sizes, **_partial_rope(config), **moe_settings(config), **_MINIMAX)


_GLM4_REQUIRED = REQUIRED | {"attention_bias": (False, True)}
_MINIMAX_REQUIRED = REQUIRED | {name: (value,) for name, value in _MINIMAX.items()}

DOTS1 = Family("dots1", "Dots1", BLOCK | _SIGMOID_MOE, _read_dots, _write_dots)
GLM4_MOE = Family("glm4_moe", "Glm4Moe", BLOCK | _SIGMOID_MOE, _read_glm4, _write_glm4, _GLM4_REQUIRED)
MINIMAX_M2 = Family("minimax_m2", "MiniMaxM2", _MINIMAX_TABLE, _read_minimax, _write_minimax, _MINIMAX_REQUIRED)


# ---- latent attention: rows


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
    | _SIGMOID_MOE
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


# ---- latent attention: reading


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
    return _decoder(theirs, _sigmoid_moe(theirs))


def _read_glm(theirs: Any) -> GPTConfig:
    counts = [theirs.n_routed_experts if kind == "sparse" else 0 for kind in theirs.mlp_layer_types]
    return _decoder(theirs, _sigmoid_moe(theirs, counts))


def _read_v2(theirs: Any) -> GPTConfig:
    own = _shared_fields(theirs)
    if theirs.topk_method == "greedy":
        own["groups"] = None
    return _decoder(theirs, moe_config(theirs, _first_dense(theirs), normalizes=False, **own))


# ---- latent attention: writing


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
    return decoder_settings(config, **_rope(config, attention), **_shared_settings(config), **settings)


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
