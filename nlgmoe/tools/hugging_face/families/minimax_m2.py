"""MiniMax-M2: every block MoE, DeepSeek-V3's router without shared experts, half of each head turns.

Queries and keys are normalised as a whole; weights of a token's experts always sum to 1.
"""

from __future__ import annotations

from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.layers.routers.sigmoid import SigmoidRouterConfig
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.llama import LAYER
from nlgmoe.tools.hugging_face.families.mixtral import TABLE
from nlgmoe.tools.hugging_face.families.rope import rope_settings
from nlgmoe.tools.hugging_face.families.settings import (
    REQUIRED,
    decoder_config,
    decoder_settings,
    moe_config,
    moe_settings,
)

_TABLE = TABLE | {"blocks.#.moe.router.bias": LAYER + "block_sparse_moe.e_score_correction_bias"}

# `transformers` does not look at these; files on the hub and other programs have them.
_OWN = {"scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer"}
_OWN |= {"shared_intermediate_size": 0}


def _read(theirs: Any) -> GPTConfig:
    moe = moe_config(theirs, theirs.num_local_experts, normalizes=True, router=SigmoidRouterConfig())
    return decoder_config(theirs, partial=True, qk_norm="projection", moe=moe)


def _write(config: GPTConfig) -> dict[str, Any]:
    own = {
        "intermediate_size": config.expert_ffn_size,
        "head_dim": config.head_size,
        "rotary_dim": config.rotary_size,  # for other programs
        **rope_settings(config, partial_rotary_factor=config.rotary_size / config.head_size),
    }
    return decoder_settings(config, **own, **moe_settings(config), **_OWN)


MINIMAX_M2 = Family(
    "minimax_m2", "MiniMaxM2", _TABLE, _read, _write, REQUIRED | {name: (value,) for name, value in _OWN.items()}
)
