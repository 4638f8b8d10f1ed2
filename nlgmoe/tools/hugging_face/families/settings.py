"""Settings that families share: a configuration of `transformers`, read and written.

YaRN multiplies cosines and sines by a temperature. Where all values of a head turn, this is a factor of each product of a query
and a key, its square, which is part of our `attention_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.rotary import Llama3, Yarn
from nlgmoe.parts import RotaryScaling
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.validation import SettingError


class UnsupportedError(SettingError):
    """A family's setting that nlgmoe does not compute, or a model's that the family does not express, as `setting=value`."""


# Values of settings that nlgmoe computes; a family without the setting has that value.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "clip_qkv": (None,),
    "sliding_window": (None,),
    "router_jitter_noise": (0.0,),
}


# ---- reading: `theirs` is the object of transformers' configuration class


def check_required(theirs: Any, required: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise an `UnsupportedError` if a setting has another value."""
    for name, supported in required.items():
        if name == "sliding_window" and getattr(theirs, "layer_types", None):  # which say it for each layer, below
            continue
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
    """Read a model with Llama's block: RMSNorm, SwiGLU, rotary positions, no biases; `more` are further or other fields.

    `partial`: the family's class reads `partial_rotary_factor`; most ignore it.
    """
    head_dim = getattr(theirs, "head_dim", None)
    width, temperature = head_dim or theirs.hidden_size // theirs.num_attention_heads, rope_temperature(theirs)
    rope = _rope_fields(theirs, width, partial)
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
    """Read a mixture whose blocks all, but those with 0 experts, have equally many; `more` are further fields.

    `num_experts` are those of each MoE block, or of every block, 0 for a dense one; the weights of a token's experts sum to 1 if
    the family `normalizes`.
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
    """Return the settings of a model with Llama's block, and further settings, or other values."""
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
    """Return the settings of a mixture that most families have."""
    experts = max(experts_per_layer(config))
    # `num_experts` is for readers of version 4.
    return {"num_experts_per_tok": moe_of(config).top_k, "num_experts": experts, "num_local_experts": experts}


def moe_of(config: GPTConfig) -> MoEConfig:
    """Return the mixture of a model; raise an `UnsupportedError` if it is dense."""
    if config.moe is None:
        raise UnsupportedError("moe=null")
    return config.moe


# ---- rotary positions, `rope_parameters`


def _rope_fields(theirs: Any, width: int, partial: bool) -> dict[str, Any]:
    """Return the fields of rotary positions; `width` is that of a head, `rope_temperature` is left to the caller."""
    rope = theirs.rope_parameters
    turning = int(width * (share := rope.get("partial_rotary_factor", 1.0)))
    if turning != width and not partial:
        raise UnsupportedError(f"partial_rotary_factor={share}")
    return {
        "rope_theta": float(rope["rope_theta"]),
        "rotary_dim": None if turning == width else turning,
        "rotary_scaling": _rotary_scaling(theirs, rope),
    }


def _rotary_scaling(theirs: Any, rope: Mapping[str, Any]) -> RotaryScaling | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    length = rope.get("original_max_position_embeddings") or theirs.max_position_embeddings
    if kind == "llama3":
        limits = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return Llama3(float(rope["factor"]), length, *limits)
    if kind != "yarn":
        raise UnsupportedError(f"rope_type={kind}")
    limits = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    return Yarn(_yarn_factor(theirs), length, *limits, truncate=rope.get("truncate", True))


def _yarn_factor(theirs: Any) -> float:
    rope = theirs.rope_parameters
    return float(rope.get("factor") or theirs.max_position_embeddings / rope["original_max_position_embeddings"])


def rope_temperature(theirs: Any) -> float:
    """Return the factor of cosines and sines, for queries and for keys: YaRN's temperature."""
    rope = theirs.rope_parameters
    if rope.get("rope_type", "default") != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor, above, below = _yarn_factor(theirs), rope.get("mscale"), rope.get("mscale_all_dim")
    return yarn_mscale(factor, above) / yarn_mscale(factor, below) if above and below else yarn_mscale(factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's temperature (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_settings(config: GPTConfig, **settings: Any) -> dict[str, Any]:
    """Return the settings of rotary positions, with further or other ones of `rope_parameters`."""
    if config.rope_theta is None:
        return {}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rotary_scaling
    if isinstance(scaling, Llama3):
        rope |= {"rope_type": "llama3", "low_freq_factor": scaling.low_freq_factor}
        rope["high_freq_factor"] = scaling.high_freq_factor
    elif isinstance(scaling, Yarn):
        rope |= {"rope_type": "yarn", "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        rope |= {"truncate": scaling.truncate, "attention_factor": 1.0}
        if config.attention_scale is not None:
            rope["attention_factor"] = math.sqrt(config.attention_scale * math.sqrt(config.head_size))
    if isinstance(scaling, Llama3 | Yarn):
        rope |= {"factor": scaling.factor, "original_max_position_embeddings": scaling.original_length}
    return {"rope_parameters": rope | settings}
