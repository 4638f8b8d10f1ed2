"""Small models of other families, in the classes of `transformers`."""

from typing import Any

import torch
import transformers
from torch import Tensor

from nlgmoe.tools.hugging_face.families import FAMILIES

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
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "intermediate_size": 40}
SIGMOID = MOE | {"n_routed_experts": 8, "moe_intermediate_size": 24, "n_shared_experts": 1, "num_experts_per_tok": 3}
SIGMOID |= {"first_k_dense_replace": 1, "norm_topk_prob": True}
DENSE = {"intermediate_size": 56}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7, "logits_scaling": 0.5}


def scaled(kind: str, theta: float, length: int = 8, **values: Any) -> dict[str, Any]:
    """Return `rope_parameters` of a model whose first training had texts of `length` tokens, fewer than those of the tests."""
    return {"rope_type": kind, "rope_theta": theta, "original_max_position_embeddings": length, **values}


YARN = scaled("yarn", 1e4, factor=4.0)
BETAS = {"beta_fast": 0.5, "beta_slow": 0.1}  # turns in 8 tokens
LATENT = MOE | {"kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10, "q_lora_rank": 24}
LATENT |= {"n_routed_experts": 8, "moe_intermediate_size": 24, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1}
LATENT_YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
LATENT_YARN |= {"original_max_position_embeddings": 16, "mscale": 0.707, "mscale_all_dim": 0.707}
# family, or family and what is special -> settings
VARIANTS: dict[str, dict[str, Any]] = {
    "olmoe": MOE | {"num_experts": 8},
    "olmoe, grouped queries, normalised, tied": MOE
    | {"num_experts": 8, "num_key_value_heads": 2, "norm_topk_prob": True, "tie_word_embeddings": True},
    "qwen3_moe, wide heads, a dense block": MOE
    | {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 16, "mlp_only_layers": [1]}
    | {"num_key_value_heads": 2, "norm_topk_prob": True, "num_experts_per_tok": 3},
    "mixtral, top-3, theta": MOE
    | {"num_local_experts": 4, "num_experts_per_tok": 3, "num_key_value_heads": 2}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "qwen2_moe, grouped queries": MOE
    | {"num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 36}
    | {"num_key_value_heads": 2, "num_experts_per_tok": 3},
    "qwen2_moe, a dense block, no biases, normalised, tied": MOE
    | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48, "qkv_bias": False}
    | {"mlp_only_layers": [2], "norm_topk_prob": True, "tie_word_embeddings": True},
    "dots1, groups": SIGMOID
    | {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.5, "head_dim": 16},
    "dots1, all blocks sparse, top-2, not normalised": SIGMOID
    | {"first_k_dense_replace": 0, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "glm4_moe, half of a head turns": SIGMOID
    | {"attention_bias": True, "head_dim": 16, "num_key_value_heads": 2, "routed_scaling_factor": 1.5},
    "glm4_moe, norms of heads, groups, all of a head turns, top-1": SIGMOID
    | {"use_qk_norm": True, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 1, "norm_topk_prob": False}
    | {"first_k_dense_replace": 2, "partial_rotary_factor": 1.0, "tie_word_embeddings": True},
    "minimax_m2, half of a head turns": MOE
    | {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16, "num_key_value_heads": 2}
    | {"rotary_dim": 8, "rms_norm_eps": 1e-3},
    "minimax_m2, all of a head turns, top-2, yarn, tied": MOE
    | {"num_local_experts": 4, "head_dim": 12, "tie_word_embeddings": True, "rope_parameters": YARN},
    "granitemoe": MOE | GRANITE | {"num_local_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 2},
    "granitemoe, wide heads, yarn, tied": MOE
    | GRANITE
    | {"num_local_experts": 4, "head_dim": 16, "tie_word_embeddings": True, "rope_parameters": YARN},
    "granitemoeshared": MOE | GRANITE | {"num_local_experts": 4, "shared_intermediate_size": 56, "rms_norm_eps": 1e-5},
    "deepseek_v3, groups, yarn": LATENT
    | {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "rope_parameters": LATENT_YARN},
    "deepseek_v3, whole queries, two shared experts, tied": LATENT
    | {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "v_head_dim": 12, "n_shared_experts": 2}
    | {"first_k_dense_replace": 0, "rms_norm_eps": 1e-3, "tie_word_embeddings": True},
    "deepseek_v2, yarn": LATENT
    | {"q_lora_rank": None, "n_shared_experts": 2, "num_experts_per_tok": 3, "norm_topk_prob": True}
    | {"rope_parameters": LATENT_YARN | {"beta_fast": 4.0, "mscale": 1.2, "mscale_all_dim": 1.2}},
    "deepseek_v2, groups": LATENT
    | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    | {"first_k_dense_replace": 2},
    "glm4_moe_lite, dense blocks between": LATENT
    | {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"], "num_experts_per_tok": 4},
    "glm4_moe_lite, whole queries, groups, yarn": LATENT
    | {"q_lora_rank": None, "n_group": 2, "topk_group": 1}
    | {"rope_parameters": LATENT_YARN | {"attention_factor": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}},
    "granite, yarn": DENSE | GRANITE | {"num_key_value_heads": 2, "rope_parameters": YARN, "head_dim": 12},
    "llama": DENSE | {"num_key_value_heads": 1, "head_dim": 12},
    "qwen3": DENSE | {"head_dim": 16, "num_key_value_heads": 2},
    "llama, scaled as Llama 3": DENSE
    | {"head_dim": 12, "num_key_value_heads": 2}
    | {"rope_parameters": scaled("llama3", 100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=2.0, length=16)},
    "qwen3, yarn": DENSE | {"head_dim": 16, "num_key_value_heads": 2, "rope_parameters": YARN},
    "qwen3_moe, yarn, attention_factor, not truncated": MOE
    | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True}
    | {"rope_parameters": scaled("yarn", 10.0, factor=4.0, attention_factor=1.5, truncate=False, **BETAS)},
    "mixtral, yarn of lengths": MOE
    | {"num_local_experts": 4, "head_dim": 12, "rope_parameters": scaled("yarn", 100.0, factor=None)},
}
IMPORTED: dict[str, dict[str, Any]] = VARIANTS | {"gpt2": {"n_inner": 80, "layer_norm_epsilon": 1e-4}}


def their_model(variant: str) -> Any:
    classes = FAMILIES[variant.partition(",")[0]].classes
    torch.manual_seed(0)
    config = getattr(transformers, f"{classes}Config")(**SHAPE | IMPORTED[variant])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():  # scales and biases
            if tensor.dim() == 1:
                tensor.add_(0.2 * torch.randn_like(tensor))
    return model


def tokens(rows: int = 3, length: int = 17) -> Tensor:
    return torch.randint(89, (rows, length), generator=torch.Generator().manual_seed(1))
