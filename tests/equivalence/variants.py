"""Published models of other families, and faults that the comparison with `transformers` must find."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nlgmoe.config import GPTConfig
from tests.support.open_models import scaled

# family -> part of a tensor's name in its files, and the same part in the model that `transformers` builds
BUILT = dict.fromkeys(("mixtral", "minimax_m2"), ("block_sparse_moe", "mlp"))
BUILT |= dict.fromkeys(("granitemoe", "granitemoeshared"), ("router.layer", "router"))


def built_name(family: str, name: str) -> str:
    """Return the name of a parameter of `transformers`' model, other than an expert's, by the name of its tensor in the files."""
    return name.replace(*BUILT.get(family, ("", "")))


GRANITE_3 = {"embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22}
GRANITE_3 |= {"logits_scaling": 6.0, "max_position_embeddings": 4096, "tie_word_embeddings": True, "vocab_size": 49_155}
# Settings of files on the hub that the classes do not know.
HUB: dict[str, Any] = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1}
HUB_YARN: dict[str, Any] = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
HUB_YARN |= {"mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
LLAMA_3 = scaled("llama3", 5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, length=8192)
# family -> parameters and active ones in billions, values of config.json
PUBLISHED: dict[str, tuple[float, float, dict[str, Any]]] = {
    "olmoe": (6.92, 1.28, {"intermediate_size": 1024}),  # OLMoE-1B-7B
    "qwen3_moe": (30.53, 3.35, {"num_hidden_layers": 48, "head_dim": 128, "num_experts": 128, "norm_topk_prob": True}),
    "mixtral": (46.70, 12.88, {}),  # Mixtral-8x7B
    "deepseek_v3": (671.03, 37.55, HUB | {  # DeepSeek-V3, without the block that predicts a further token
        "max_position_embeddings": 163_840, "rope_theta": 10_000.0, "rope_scaling": HUB_YARN,
    }),
    "deepseek_v2": (15.71, 2.66, HUB | {  # DeepSeek-V2-Lite
        "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "moe_intermediate_size": 1408, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "q_lora_rank": None, "topk_method": "greedy", "scoring_func": "softmax",
        "vocab_size": 102_400, "intermediate_size": 10_944,
        "max_position_embeddings": 163_840, "rope_theta": 10_000.0,
        "rope_scaling": HUB_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    }),
    "glm4_moe_lite": (29.94, 3.9, {  # GLM-4.7-Flash
        "topk_method": "noaux_tc", "first_k_dense_replace": 1, "partial_rotary_factor": 1.0, "rope_theta": 1e6,
    }),
    "qwen2_moe": (14.32, 2.69, {}),  # Qwen1.5-MoE-A2.7B
    "dots1": (142.77, 14.02, {  # dots.llm1
        "hidden_size": 4096, "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    }),
    "glm4_moe": (106.85, 13.42, {"attention_bias": True, "head_dim": 128}),  # GLM-4.5-Air
    "minimax_m2": (228.69, 11.03, {"rotary_dim": 64}),  # MiniMax-M2; the published 10 does not count the embeddings
    "granitemoe": (1.33, 0.43, GRANITE_3 | {  # granite-3.0-1b-a400m; the published 0.4 does not count the embeddings
        "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 8,
    }),
    # The shape of granite-3.0-3b-a800m, and a shared expert: no published model's settings were at hand.
    "granitemoeshared": (3.45, 1.03, GRANITE_3 | {
        "hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 32, "num_attention_heads": 24,
        "num_key_value_heads": 8, "num_local_experts": 40, "num_experts_per_tok": 8, "shared_intermediate_size": 1024,
    }),
    "llama": (1.24, 1.24, {  # Llama-3.2-1B
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_parameters": LLAMA_3,
    }),
    "granite": (2.53, 2.53, GRANITE_3 | {  # granite-3.0-2b-base
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }),
    "qwen3": (1.72, 1.72, {  # Qwen3-1.7B
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }),
}  # fmt: skip


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


NOT_TRUNCATED = "qwen3_moe, yarn, attention_factor, not truncated"
SHARED_TIED = "deepseek_v3, whole queries, two shared experts, tied"
QUERIES = changed("attention.query_up.weight", lambda rows: interleaved(rows.unflatten(0, (4, 12))).flatten(0, 1))
WHOLE_QUERIES = changed("attention.query.weight", lambda rows: interleaved(rows.unflatten(0, (4, 12))).flatten(0, 1))
KEYS = changed("attention.key_value_down.weight", lambda rows: interleaved(rows[None])[0])
HEADS = changed("attention.qkv.weight", lambda rows: rows.roll(16, 0))
SCALES = changed("attention.key_norm.weight", lambda scales: scales.roll(16, 0))
FAULTS: list[tuple[str, str, Fault]] = [  # variant, what is wrong, fault
    ("qwen3_moe, wide heads, a dense block", "gate is up", swapped("experts.gate_weight", "experts.up_weight")),
    ("qwen3_moe, wide heads, a dense block", "rows of queries, heads reversed", HEADS),
    ("qwen2_moe, grouped queries", "the shared expert has no gate", setting("moe.residual_mix", "sum")),
    ("qwen2_moe, grouped queries", "no biases of queries, keys and values", setting("qkv_bias", False)),
    ("dots1, groups", "no bias on the choice", changed("moe.router.bias", torch.zeros_like)),
    ("dots1, groups", "all groups", setting("moe.groups", None)),
    ("glm4_moe, half of a head turns", "a quarter of a head turns", setting("rotary_dim", 4)),
    ("minimax_m2, half of a head turns", "scales of keys, heads reversed", SCALES),
    ("granitemoe", "no embedding_multiplier", setting("embedding_scale", 1.0)),
    ("granitemoe", "attention scaled by the width of a head", setting("attention_scale", None)),
    ("granitemoe", "another residual_multiplier", setting("residual_scale", 0.71)),
    ("granitemoe", "logits multiplied by logits_scaling", setting("logit_scale", 0.5)),
    ("granitemoe", "rows of the router", changed("router.weight", lambda rows: rows.roll(1, 0))),
    ("granitemoeshared", "up before gate", swapped("shared_expert.gate.weight", "shared_expert.up.weight")),
    ("llama, scaled as Llama 3", "another factor", setting("rotary_scaling.factor", 8.5)),
    ("llama, scaled as Llama 3", "not scaled", setting("rotary_scaling", None)),
    ("qwen3, yarn", "no temperature", setting("attention_scale", None)),
    (NOT_TRUNCATED, "another beta_fast", setting("rotary_scaling.beta_fast", 0.6)),
    ("mixtral, yarn of lengths", "the factor of the lengths", setting("rotary_scaling.factor", 4.0)),
    ("deepseek_v3, groups, yarn", "rows of queries are not reordered", QUERIES),
    (SHARED_TIED, "rows of whole queries are not reordered", WHOLE_QUERIES),
    ("deepseek_v3, groups, yarn", "rows of keys are not reordered", KEYS),
    (SHARED_TIED, "the epsilon of the latents is rms_norm_eps", setting("attention.norm_eps", 1e-3)),
    ("deepseek_v3, groups, yarn", "fewer groups", setting("moe.groups", [4, 3])),
    ("deepseek_v3, groups, yarn", "no scale of the weights", setting("moe.gate_scale", 1.0)),
    ("deepseek_v2, yarn", "normalised weights", setting("moe.normalize_weights", True)),
    ("olmoe", "another epsilon", setting("layer_norm_eps", 2e-5)),
    ("mixtral, top-3, theta", "another base of positions", setting("rope_theta", 510.0)),
]
