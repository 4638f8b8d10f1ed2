"""The feed-forward layers of DeepSeek-V3, which other families took over.

The first blocks are dense. Mixtures have sigmoid scores, a bias on the choice, groups of experts, and shared experts, whose
outputs are added: they are one MLP, `n_shared_experts` times as wide as an expert.
"""

from __future__ import annotations

from typing import Any

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.routers.sigmoid import SigmoidRouterConfig
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.hugging_face.families.llama import LAYER, shared_mlp
from nlgmoe.tools.hugging_face.families.settings import UnsupportedError, moe_config, moe_of, moe_settings
from nlgmoe.tools.hugging_face.families.tensors import Slots

SIGMOID_MOE: dict[str, Slots] = {
    "blocks.#.moe.router.bias": LAYER + "mlp.gate.e_score_correction_bias",
    **shared_mlp("shared_experts"),
}


def first_dense(theirs: Any) -> list[int]:
    """Return the number of experts of every block, of `first_k_dense_replace`."""
    dense = theirs.first_k_dense_replace
    return [0 if layer < dense else theirs.n_routed_experts for layer in range(theirs.num_hidden_layers)]


def shared_fields(theirs: Any) -> dict[str, Any]:
    """Return the fields of `MoEConfig` for the widths of experts and shared experts, and for groups and scale of the weights."""
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


def sigmoid_moe(theirs: Any, num_experts: list[int]) -> MoEConfig:
    """Read a mixture with the sigmoid router.

    Args:
        theirs: the family's configuration.
        num_experts: experts of each block, 0 for a dense one.
    """
    own = shared_fields(theirs)
    return moe_config(theirs, num_experts, theirs.norm_topk_prob, router=SigmoidRouterConfig(), **own)


def shared_settings(config: GPTConfig) -> dict[str, Any]:
    """Return the settings of a mixture with shared experts, the inverse of `shared_fields` and `first_dense`."""
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
