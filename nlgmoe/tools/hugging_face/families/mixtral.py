"""Mixtral: every block MoE, weights of a token's experts always normalised."""

from __future__ import annotations

from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.llama import BLOCK, LAYER
from nlgmoe.tools.hugging_face.families.settings import decoder_config, decoder_settings, moe_config, moe_settings

TABLE = BLOCK | {
    "blocks.#.moe.router.weight": LAYER + "block_sparse_moe.gate.weight",
    "blocks.#.moe.experts.#.gate_weight": LAYER + "block_sparse_moe.experts.{}.w1.weight",
    "blocks.#.moe.experts.#.expand_weight": LAYER + "block_sparse_moe.experts.{}.w3.weight",
    "blocks.#.moe.experts.#.project_weight": LAYER + "block_sparse_moe.experts.{}.w2.weight",
}


def _read(theirs: Any) -> GPTConfig:
    return decoder_config(theirs, moe=moe_config(theirs, theirs.num_local_experts, normalizes=True))


def _write(config: GPTConfig) -> dict[str, Any]:
    sizes = {"intermediate_size": config.expert_ffn_size, "head_dim": config.head_size}
    return decoder_settings(config, **sizes, **moe_settings(config))


MIXTRAL = Family("mixtral", "Mixtral", TABLE, _read, _write)
