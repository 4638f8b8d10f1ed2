"""Settings that families share: reading a configuration of `transformers`, writing it, and comparing two models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.attention import attention_config
from nlgmoe.parts import ATTENTION_FIELDS, IGNORED_IN_EVALUATION, MOE_PARTS
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.hugging_face.families.rope import UnsupportedError, rope_fields, rope_settings, rope_temperature

# Values of settings that nlgmoe computes; a family without the setting has that value.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "clip_qkv": (None,),
    "sliding_window": (None,),
    "router_jitter_noise": (0.0,),
}
# Of families whose `layer_types` say which layers have a window: `sliding_window` is its length.
REQUIRED_BY_LAYER = {name: values for name, values in REQUIRED.items() if name != "sliding_window"}


# ---- reading: `theirs` is the object of transformers' configuration class


def check_required(theirs: Any, required: Mapping[str, tuple[Any, ...]]) -> None:
    """Check values of settings.

    Raises:
        UnsupportedError: one has another value.
    """
    for name, supported in required.items():
        if (value := getattr(theirs, name, supported[0])) not in supported:
            raise UnsupportedError(f"{name}={value}")
    if set(getattr(theirs, "layer_types", None) or ()) - {"full_attention"}:
        raise UnsupportedError(f"layer_types={theirs.layer_types}")


def shape_fields(theirs: Any) -> dict[str, Any]:
    """Return fields that every family has."""
    return {
        "vocab_size": theirs.vocab_size,
        "seq_len": theirs.max_position_embeddings,
        "num_layers": theirs.num_hidden_layers,
        "hidden_size": theirs.hidden_size,
        "num_heads": theirs.num_attention_heads,
        "init_std": theirs.initializer_range,
    }


def decoder_config(theirs: Any, partial: bool = False, **more: Any) -> GPTConfig:
    """Read a model with Llama's block: RMSNorm, SwiGLU, rotary positions, no biases.

    Args:
        theirs: the family's configuration.
        partial: see `rope_fields`.
        more: further fields, or other values.
    """
    head_dim = getattr(theirs, "head_dim", None)
    width, temperature = head_dim or theirs.hidden_size // theirs.num_attention_heads, rope_temperature(theirs)
    rope = rope_fields(theirs, width, partial)
    if temperature != 1 and rope["rotary_dim"] is not None:  # it would scale a part of each product
        raise UnsupportedError(f"attention_factor={temperature} with partial_rotary_factor")
    values = {
        **shape_fields(theirs),
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": None if head_dim == theirs.hidden_size / theirs.num_attention_heads else head_dim,
        "ffn_hidden_size": theirs.intermediate_size,
        "attention_dropout": float(theirs.attention_dropout),
        "layer_norm_eps": theirs.rms_norm_eps,
        "ffn_network": "swiglu",
        "norm": "rmsnorm",
        **rope,
        "attention_scale": None if temperature == 1 else temperature**2 / math.sqrt(width),
        "bias": False,
        "tied_embeddings": bool(theirs.tie_word_embeddings),
    }
    return GPTConfig(**values | more)


def moe_config(theirs: Any, num_experts: int | list[int], normalizes: bool, **more: Any) -> MoEConfig:
    """Read a mixture whose blocks all, but those with 0 experts, have equally many experts.

    Args:
        theirs: the family's configuration.
        num_experts: experts of each MoE block, or of every block, 0 for a dense one.
        normalizes: the weights of a token's experts sum to 1.
        more: further fields, such as `router`.
    """
    top_k = theirs.num_experts_per_tok
    if top_k == 1 and normalizes:
        raise UnsupportedError("num_experts_per_tok=1 with normalised weights")
    if isinstance(num_experts, list) and all(num_experts):
        num_experts = num_experts[0]
    own_router = "router" in more  # which reads no second_expert
    second: Any = "argmax" if top_k == 2 and not own_router else MoEConfig.second_expert
    values = {"expert_interval": 1, "top_k": top_k, "token_dropping": False, "second_expert": second}
    return MoEConfig(num_experts=num_experts, **values | {"normalize_weights": None if normalizes else False} | more)


# ---- writing


def decoder_settings(config: GPTConfig, **settings: Any) -> dict[str, Any]:
    """Return the settings of a model with Llama's block.

    Args:
        config: of the model.
        settings: further settings, or other values.
    """
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.seq_len,
        "initializer_range": float(config.init_std),
        "rms_norm_eps": float(config.layer_norm_eps),
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": float(config.attention_dropout),
        "hidden_act": "silu",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # their defaults are another model's
        **rope_settings(config),
        **settings,
    }


def moe_settings(config: GPTConfig) -> dict[str, Any]:
    """Return the settings of a mixture that most families have.

    Raises:
        UnsupportedError: the model is dense.
    """
    experts = max(experts_per_layer(config))
    # `num_experts` is for readers of version 4.
    return {"num_experts_per_tok": moe_of(config).top_k, "num_experts": experts, "num_local_experts": experts}


def moe_of(config: GPTConfig) -> MoEConfig:
    """Return the mixture of a model.

    Raises:
        UnsupportedError: the model is dense.
    """
    if config.moe is None:
        raise UnsupportedError("moe=null")
    return config.moe


# ---- comparing

# Settings that are compared below, in another form, or not at all.
_REPLACED = (IGNORED_IN_EVALUATION - {"eval_token_dropping"}) | {
    *("vocab_size_multiple", "moe", "expert_interval", "residual_mix"),
    *("ffn_hidden_size", "expert_ffn_size", "shared_ffn_size"),
}


def computation(config: GPTConfig) -> dict[str, Any]:
    """Return the settings that decide the computation in evaluation, those of `moe` too, by name, with nulls resolved."""
    moe, counts = config.moe, experts_per_layer(config)
    found: dict[str, Any] = config.to_dict()
    found |= found.pop("moe") or {}
    # Parts that are null are not in `found`.
    null = dict.fromkeys((*(field.name for field in fields(config)), *MOE_PARTS))
    values = {name: value for name, value in {**null, **found}.items() if name not in _REPLACED}
    attention = attention_config(config)
    width, _ = attention.score_widths(config)
    values |= {"num_kv_heads": config.kv_heads, "head_dim": config.head_size, "rotary_dim": config.rotary_size}
    values |= {"attention_scale": config.attention_scale or width**-0.5, "num_experts": counts}
    values["qkv_bias"] = config.has_qkv_bias
    values = {name: value for name, value in values.items() if name not in ATTENTION_FIELDS - attention.reads_fields}
    if 0 in counts:
        values["ffn_hidden_size"] = config.ffn_size
    if moe is None:
        return values
    values |= {"normalize_weights": moe.normalizes, "expert_ffn_size": config.expert_ffn_size}
    if moe.mlp_type == "residual":
        values |= {"residual_mix": moe.residual_mix, "shared_ffn_size": config.shared_ffn_size}
    if moe.router is not None:
        settings = values["router"]["init_args"]
        read = {name: value for name, value in settings.items() if name not in moe.router.ignored_in_evaluation}
        values["router"] = values["router"] | {"init_args": read}
    return values


def differing_settings(config: GPTConfig, other: GPTConfig) -> list[str]:
    """Return settings of a model, as `name=value`, with which it computes something else than the other."""
    ours, theirs = computation(config), computation(other)
    # A setting that one of them lacks has no meaning there, because of another one that differs, such as `mlp_type`.
    return [f"{name}={_text(ours[name])}" for name in ours if name in theirs and not _equal(ours[name], theirs[name])]


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float | int):  # it may be the reciprocal of a reciprocal
        return math.isclose(value, other, rel_tol=1e-12)
    return bool(value == other)


def _text(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
