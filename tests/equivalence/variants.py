"""Models of other families that the tests compare with `transformers`, and faults that the comparison must find."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from nlgmoe.config import GPTConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 89,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = {"num_experts_per_tok": 2, "intermediate_size": 40}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7, "logits_scaling": 0.5}


def scaled(kind: str, theta: float, length: int = 8, **values: Any) -> dict[str, Any]:
    """Return `rope_parameters` of a model whose first training had texts of `length` tokens, fewer than those of the tests."""
    return {"rope_type": kind, "rope_theta": theta, "original_max_position_embeddings": length, **values}


YARN = scaled("yarn", 1e4, factor=4.0)
BETAS = {"beta_fast": 0.5, "beta_slow": 0.1}  # turns in 8 tokens
# variant -> family, settings
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", MOE | {"num_experts": 8}),
    "olmoe, grouped queries, normalised, tied": (
        "olmoe",
        MOE | {"num_experts": 8, "num_key_value_heads": 2, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "olmoe, top-1": ("olmoe", MOE | {"num_experts": 8, "num_experts_per_tok": 1}),
    "qwen3_moe, wide heads, a dense block": (
        "qwen3_moe",
        MOE
        | {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 16, "mlp_only_layers": [1]}
        | {"num_key_value_heads": 2, "norm_topk_prob": True, "num_experts_per_tok": 3},
    ),
    "qwen3_moe, every second block": (
        "qwen3_moe",
        MOE | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "decoder_sparse_step": 2},
    ),
    "mixtral, top-3, theta": (
        "mixtral",
        {**MOE, "num_local_experts": 4, "num_experts_per_tok": 3, "num_key_value_heads": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "granitemoe": (
        "granitemoe",
        {**MOE, **GRANITE, "num_local_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 2},
    ),
    "granitemoe, wide heads, yarn, tied": (
        "granitemoe",
        {**MOE, **GRANITE, "num_local_experts": 4, "head_dim": 16, "tie_word_embeddings": True}
        | {"rope_parameters": YARN},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        {**MOE, **GRANITE, "num_local_experts": 4, "shared_intermediate_size": 56, "rms_norm_eps": 1e-5},
    ),
    "granite, yarn": (
        "granite",
        GRANITE | {"intermediate_size": 56, "num_key_value_heads": 2, "rope_parameters": YARN, "head_dim": 12},
    ),
    "llama, wide heads, tied": ("llama", {"intermediate_size": 56, "head_dim": 20, "tie_word_embeddings": True}),
    "llama": ("llama", {"intermediate_size": 56, "num_key_value_heads": 1, "head_dim": 12}),
    "qwen3": ("qwen3", {"intermediate_size": 56, "head_dim": 16, "num_key_value_heads": 2}),
    "llama 3": (
        "llama",
        {"intermediate_size": 56, "head_dim": 12, "num_key_value_heads": 2}
        | {
            "rope_parameters": scaled("llama3", 100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=2.0, length=16)
        },
    ),
    "llama, yarn, beta": (
        "llama",
        {"intermediate_size": 56, "rope_parameters": scaled("yarn", 10.0, factor=4.0) | BETAS},
    ),
    "qwen3, yarn": (
        "qwen3",
        {"intermediate_size": 56, "head_dim": 16, "num_key_value_heads": 2, "rope_parameters": YARN},
    ),
    "qwen3_moe, yarn, attention_factor, not truncated": (
        "qwen3_moe",
        MOE
        | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True}
        | {"rope_parameters": scaled("yarn", 10.0, factor=4.0, attention_factor=1.5, truncate=False) | BETAS},
    ),
    "mixtral, yarn of lengths": (
        "mixtral",
        MOE | {"num_local_experts": 4, "head_dim": 12, "rope_parameters": scaled("yarn", 100.0, factor=None)},
    ),
}

# family -> part of a tensor's name in its files, and the same part in the model that `transformers` builds
BUILT: dict[str, tuple[str, str]] = {
    "mixtral": ("block_sparse_moe", "mlp"),
    **dict.fromkeys(("granitemoe", "granitemoeshared"), ("router.layer", "router")),
}


def built_name(family: str, name: str) -> str:
    """Return the name of a parameter of `transformers`' model, other than an expert's, by the name of its tensor in the files."""
    return name.replace(*BUILT.get(family, ("", "")))


# family, or family and model -> values of config.json, parameters and active ones in billions
GRANITE_3 = {"embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22} | {
    "logits_scaling": 6.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
PUBLISHED: dict[str, tuple[dict[str, Any], float, float]] = {
    "olmoe": ({"intermediate_size": 1024}, 6.92, 1.28),  # OLMoE-1B-7B
    "qwen3_moe": (  # Qwen3-30B-A3B
        {"num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True, "num_experts": 128},
        30.53,
        3.35,
    ),
    "mixtral": ({}, 46.70, 12.88),  # Mixtral-8x7B
    "granitemoe": (  # granite-3.0-1b-a400m; the published 0.4 does not count the embeddings
        {"vocab_size": 49_155, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 24}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 8}
        | GRANITE_3,
        1.33,
        0.43,
    ),
    "granitemoe, 3B": (  # granite-3.0-3b-a800m
        {"vocab_size": 49_155, "hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 32}
        | {"num_attention_heads": 24, "num_key_value_heads": 8, "num_local_experts": 40, "num_experts_per_tok": 8}
        | GRANITE_3,
        3.3,
        0.88,
    ),
    "granitemoeshared": (  # the shape of granite-3.0-3b-a800m, and a shared MLP: no published model's settings were at hand
        {"vocab_size": 49_155, "hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 32}
        | {"num_attention_heads": 24, "num_key_value_heads": 8, "num_local_experts": 40, "num_experts_per_tok": 8}
        | GRANITE_3
        | {"shared_intermediate_size": 1024},
        3.45,
        1.03,
    ),
    "llama": (  # Llama-3.2-1B
        {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
        | {"max_position_embeddings": 131_072, "rms_norm_eps": 1e-5}
        | {
            "rope_parameters": scaled(
                "llama3", 5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, length=8192
            )
        },
        1.24,
        1.24,
    ),
    "granite": (  # granite-3.0-2b-base
        {"vocab_size": 49_155, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 40}
        | {"num_attention_heads": 32, "num_key_value_heads": 8}
        | GRANITE_3,
        2.53,
        2.53,
    ),
    "qwen3": (  # Qwen3-1.7B
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
        | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
        1.72,
        1.72,
    ),
}

Fault = Callable[[GPTConfig, dict[str, Tensor]], GPTConfig]  # changes a state dict in place, returns the configuration


def setting(name: str, value: Any) -> Fault:
    """Another value of a setting, such as `layer_norm_eps`, `moe.gate_scale` or `attention.norm_eps`."""
    section, _, field = name.rpartition(".")

    def change(config: GPTConfig, state: dict[str, Tensor]) -> GPTConfig:
        if not section:
            return replace(config, **{field: value})
        return replace(config, **{section: replace(getattr(config, section), **{field: value})})

    return change


def swapped(one: str, other: str) -> Fault:
    """The tensors whose names end with `one` have the values of those that end with `other`, and the reverse."""

    def change(config: GPTConfig, state: dict[str, Tensor]) -> GPTConfig:
        for name in [name for name in state if name.endswith(one)]:
            twin = name.removesuffix(one) + other
            state[name], state[twin] = state[twin], state[name]
        return config

    return change


def changed(ending: str, by: Callable[[Tensor], Tensor]) -> Fault:
    """The tensors whose names end with `ending`, changed by a function, such as an order of rows."""

    def change(config: GPTConfig, state: dict[str, Tensor]) -> GPTConfig:
        names = [name for name in state if name.endswith(ending)]
        assert names, ending
        state.update({name: by(state[name]) for name in names})
        return config

    return change


# fault -> variant and fault
FAULTS: dict[str, tuple[str, Fault]] = {
    "qwen3_moe: gate and expand are swapped": (
        "qwen3_moe, wide heads, a dense block",
        swapped("experts.gate_weight", "experts.expand_weight"),
    ),
    "qwen3_moe: rows of queries, heads reversed": (
        "qwen3_moe, wide heads, a dense block",
        changed("attention.qkv.weight", lambda rows: rows.roll(16, 0)),
    ),
    "granitemoe: no embedding_multiplier": ("granitemoe", setting("embedding_scale", 1.0)),
    "granitemoe: attention scaled by the width of a head": ("granitemoe", setting("attention_scale", None)),
    "granitemoe: another residual_multiplier": ("granitemoe", setting("residual_scale", 0.71)),
    "granitemoe: logits multiplied by logits_scaling": ("granitemoe", setting("logit_scale", 0.5)),
    "granitemoe: expand before gate": ("granitemoe", swapped("experts.gate_weight", "experts.expand_weight")),
    "granitemoe: rows of the router": ("granitemoe", changed("router.weight", lambda rows: rows.roll(1, 0))),
    "granitemoeshared: expand before gate": ("granitemoeshared", swapped("mlp.gate.weight", "mlp.expand.weight")),
    "granitemoeshared: halves of a sum": ("granitemoeshared", changed("mlp.project.weight", lambda w: w / 2)),
    "granitemoe, yarn: no temperature": ("granitemoe, wide heads, yarn, tied", setting("attention_scale", 0.4)),
    "llama 3: another factor": ("llama 3", setting("rotary_scaling.factor", 8.5)),
    "llama 3: another limit": ("llama 3", setting("rotary_scaling.high_freq_factor", 2.1)),
    "llama 3: not scaled": ("llama 3", setting("rotary_scaling", None)),
    "yarn: another factor": ("qwen3, yarn", setting("rotary_scaling.factor", 4.1)),
    "yarn: no temperature": ("qwen3, yarn", setting("attention_scale", None)),
    "yarn: another attention_factor": (
        "qwen3_moe, yarn, attention_factor, not truncated",
        setting("attention_scale", 1.49**2 / 4),
    ),
    "yarn: truncated": (
        "qwen3_moe, yarn, attention_factor, not truncated",
        setting("rotary_scaling.truncate", True),
    ),
    "yarn: another beta_fast": ("llama, yarn, beta", setting("rotary_scaling.beta_fast", 0.6)),
    "yarn: the factor of the lengths": ("mixtral, yarn of lengths", setting("rotary_scaling.factor", 4.0)),
    "olmoe: another epsilon": ("olmoe", setting("layer_norm_eps", 2e-5)),
    "mixtral: another base of positions": ("mixtral, top-3, theta", setting("rope_theta", 510.0)),
}
