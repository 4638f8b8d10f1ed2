"""Published models of other families, and faults that the comparison with `transformers` must find."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nlgmoe.config import GPTConfig
from tests.support.open_models import scaled

# family -> part of a tensor's name in its files, and the same part in the model that `transformers` builds
BUILT: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("mixtral", "minimax_m2"), ("block_sparse_moe", "mlp")),
    **dict.fromkeys(("granitemoe", "granitemoeshared"), ("router.layer", "router")),
}


def built_name(family: str, name: str) -> str:
    """Return the name of a parameter of `transformers`' model, other than an expert's, by the name of its tensor in the files."""
    return name.replace(*BUILT.get(family, ("", "")))


GRANITE_3 = {"embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22} | {
    "logits_scaling": 6.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
# Settings of files on the hub that the classes do not know.
HUB = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1}
HUB_YARN: dict[str, Any] = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
HUB_YARN |= {"mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
# family, or family and model -> values of config.json, parameters and active ones in billions
PUBLISHED: dict[str, tuple[dict[str, Any], float, float]] = {
    "olmoe": ({"intermediate_size": 1024}, 6.92, 1.28),  # OLMoE-1B-7B
    "qwen3_moe": (  # Qwen3-30B-A3B
        {"num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True, "num_experts": 128},
        30.53,
        3.35,
    ),
    "mixtral": ({}, 46.70, 12.88),  # Mixtral-8x7B
    "deepseek_v3, Moonlight-16B-A3B": (
        HUB
        | {"vocab_size": 163_840, "hidden_size": 2048, "intermediate_size": 11_264, "moe_intermediate_size": 1408}
        | {"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2}
        | {"n_routed_experts": 64, "routed_scaling_factor": 2.446, "q_lora_rank": None, "n_group": 1, "topk_group": 1}
        | {"num_experts_per_tok": 6, "first_k_dense_replace": 1, "max_position_embeddings": 8192}
        | {"rope_theta": 50_000.0, "rms_norm_eps": 1e-5},
        15.96,
        2.91,
    ),
    "deepseek_v3": (  # DeepSeek-V3, without the block that predicts a further token
        HUB | {"max_position_embeddings": 163_840, "rope_theta": 10_000.0, "rope_scaling": HUB_YARN},
        671.03,
        37.55,
    ),
    "deepseek_v2": (  # DeepSeek-V2-Lite
        {
            **HUB,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
        }
        | {"vocab_size": 102_400, "hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408}
        | {"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts_per_tok": 6}
        | {"q_lora_rank": None, "first_k_dense_replace": 1, "max_position_embeddings": 163_840}
        | {"rope_theta": 10_000.0, "rope_scaling": HUB_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
        15.71,
        2.66,
    ),
    "glm4_moe_lite": (  # GLM-4.7-Flash
        {"topk_method": "noaux_tc", "first_k_dense_replace": 1, "partial_rotary_factor": 1.0, "rope_theta": 1e6},
        29.94,
        3.9,
    ),
    "qwen2_moe": ({}, 14.32, 2.69),  # Qwen1.5-MoE-A2.7B
    "dots1": (  # dots.llm1
        {"hidden_size": 4096, "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6}
        | {"first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        142.77,
        14.02,
    ),
    "glm4_moe": ({"attention_bias": True, "head_dim": 128}, 106.85, 13.42),  # GLM-4.5-Air
    "minimax_m2": ({"rotary_dim": 64}, 228.69, 11.03),  # MiniMax-M2; the published 10 does not count the embeddings
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


def interleaved(rows: Tensor) -> Tensor:
    """Rows of heads, `[N, rows, ...]`, of which the last four are two pairs that turn: (0, 2) and (1, 3) become neighbours."""
    return torch.cat([rows[:, :-4], rows[:, [-4, -2, -3, -1]]], dim=1)


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
    "qwen2_moe: the shared expert has no gate": (
        "qwen2_moe, grouped queries",
        setting("moe.residual_mix", "sum"),
    ),
    "qwen2_moe: no biases of queries, keys and values": ("qwen2_moe, grouped queries", setting("qkv_bias", False)),
    "dots1: no bias on the choice": ("dots1, groups", changed("moe.router.bias", torch.zeros_like)),
    "dots1: all groups": ("dots1, groups", setting("moe.groups", None)),
    "glm4_moe: a quarter of a head turns": ("glm4_moe, half of a head turns", setting("rotary_dim", 4)),
    "minimax_m2: scales of keys, heads reversed": (
        "minimax_m2, half of a head turns",
        changed("attention.key_norm.weight", lambda scales: scales.roll(16, 0)),
    ),
    "granitemoe: no embedding_multiplier": ("granitemoe", setting("embedding_scale", 1.0)),
    "granitemoe: attention scaled by the width of a head": ("granitemoe", setting("attention_scale", None)),
    "granitemoe: another residual_multiplier": ("granitemoe", setting("residual_scale", 0.71)),
    "granitemoe: logits multiplied by logits_scaling": ("granitemoe", setting("logit_scale", 0.5)),
    "granitemoe: rows of the router": ("granitemoe", changed("router.weight", lambda rows: rows.roll(1, 0))),
    "granitemoeshared: expand before gate": ("granitemoeshared", swapped("mlp.gate.weight", "mlp.expand.weight")),
    "llama 3: another factor": ("llama 3", setting("rotary_scaling.factor", 8.5)),
    "llama 3: not scaled": ("llama 3", setting("rotary_scaling", None)),
    "yarn: no temperature": ("qwen3, yarn", setting("attention_scale", None)),
    "yarn: another beta_fast": ("llama, yarn, beta", setting("rotary_scaling.beta_fast", 0.6)),
    "yarn: the factor of the lengths": ("mixtral, yarn of lengths", setting("rotary_scaling.factor", 4.0)),
    "deepseek_v3: rows of queries are not reordered": (
        "deepseek_v3, groups, yarn",
        changed("attention.query_up.weight", lambda rows: interleaved(rows.unflatten(0, (4, 12))).flatten(0, 1)),
    ),
    "deepseek_v3: rows of whole queries are not reordered": (
        "deepseek_v3, whole queries, two shared experts, tied",
        changed("attention.query.weight", lambda rows: interleaved(rows.unflatten(0, (4, 12))).flatten(0, 1)),
    ),
    "deepseek_v3: rows of keys are not reordered": (
        "deepseek_v3, groups, yarn",
        changed("attention.key_value_down.weight", lambda rows: interleaved(rows[None])[0]),
    ),
    "deepseek_v3: the epsilon of the latents is rms_norm_eps": (
        "deepseek_v3, whole queries, two shared experts, tied",
        setting("attention.norm_eps", 1e-3),
    ),
    "deepseek_v3: fewer groups": ("deepseek_v3, groups, yarn", setting("moe.groups", [4, 3])),
    "deepseek_v3: no scale of the weights": ("deepseek_v3, groups, yarn", setting("moe.gate_scale", 1.0)),
    "deepseek_v2: normalised weights": ("deepseek_v2, yarn", setting("moe.normalize_weights", True)),
    "olmoe: another epsilon": ("olmoe", setting("layer_norm_eps", 2e-5)),
    "mixtral: another base of positions": ("mixtral, top-3, theta", setting("rope_theta", 510.0)),
}
