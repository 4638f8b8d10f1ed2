"""Granite 3's mixtures: Llama's block with four scales, every block MoE, weights always normalised, perhaps with a shared MLP.

x = embedding_multiplier * E[token]        x = x + residual_multiplier * branch(norm(x))
scores = attention_multiplier * q k^T      logits = head(norm(x)) / logits_scaling
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.layers.rotary import Yarn
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.llama import BLOCK, LAYER
from nlgmoe.tools.hugging_face.families.rope import UnsupportedError, rope_settings, rope_temperature, yarn_mscale
from nlgmoe.tools.hugging_face.families.settings import decoder_config, decoder_settings, moe_config, moe_settings
from nlgmoe.tools.hugging_face.families.tensors import Slot

_EXPERTS, _SHARED = LAYER + "block_sparse_moe.", LAYER + "shared_mlp."
_TABLE = BLOCK | {
    "blocks.#.moe.router.weight": _EXPERTS + "router.layer.weight",
    "blocks.#.moe.experts.#.gate_weight": _EXPERTS + "input_linear.weight",
    "blocks.#.moe.experts.#.expand_weight": Slot(_EXPERTS + "input_linear.weight", part=1),
    "blocks.#.moe.experts.#.project_weight": _EXPERTS + "output_linear.weight",
    "blocks.#.moe.mlp.gate.weight": _SHARED + "input_linear.weight",
    "blocks.#.moe.mlp.expand.weight": Slot(_SHARED + "input_linear.weight", part=1),
    "blocks.#.moe.mlp.project.weight": _SHARED + "output_linear.weight",
}


def _read(theirs: Any, **shared: Any) -> GPTConfig:
    return decoder_config(
        theirs,
        attention_scale=theirs.attention_multiplier * rope_temperature(theirs) ** 2,
        embedding_scale=float(theirs.embedding_multiplier),
        residual_scale=float(theirs.residual_multiplier),
        logit_scale=1 / theirs.logits_scaling,
        moe=moe_config(theirs, theirs.num_local_experts, normalizes=True, **shared),
    )


def _read_shared(theirs: Any) -> GPTConfig:
    size = theirs.shared_intermediate_size
    if not size:
        raise UnsupportedError(f"shared_intermediate_size={size}")
    return _read(theirs, mlp_type="residual", residual_mix="sum", shared_ffn_size=size)


def _write(config: GPTConfig) -> dict[str, Any]:
    scaling, width = config.rotary_scaling, config.head_size
    factor = yarn_mscale(scaling.factor) ** 2 if isinstance(scaling, Yarn) else 1.0  # of products, by the temperature
    return decoder_settings(
        config,
        intermediate_size=config.expert_ffn_size,
        head_dim=width,
        attention_multiplier=(config.attention_scale or width**-0.5) / factor,
        embedding_multiplier=config.embedding_scale,
        residual_multiplier=config.residual_scale,
        logits_scaling=1 / config.logit_scale,
        **moe_settings(config),
        **rope_settings(replace(config, attention_scale=factor * width**-0.5)),
    )


def _write_shared(config: GPTConfig) -> dict[str, Any]:
    return _write(config) | {"shared_intermediate_size": config.shared_ffn_size}


GRANITE_MOE = Family("granitemoe", "GraniteMoe", _TABLE, _read, _write)
GRANITE_MOE_SHARED = Family("granitemoeshared", "GraniteMoeShared", _TABLE, _read_shared, _write_shared)
