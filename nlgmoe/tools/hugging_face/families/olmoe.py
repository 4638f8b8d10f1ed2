"""OLMoE: every block MoE, queries and keys normalised as a whole; weights of a token's experts may be normalised."""

from __future__ import annotations

from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.llama import BLOCK
from nlgmoe.tools.hugging_face.families.settings import (
    decoder_config,
    decoder_settings,
    moe_config,
    moe_of,
    moe_settings,
)


def _read(theirs: Any) -> GPTConfig:
    return decoder_config(
        theirs, qk_norm="projection", moe=moe_config(theirs, theirs.num_experts, theirs.norm_topk_prob)
    )


def _write(config: GPTConfig) -> dict[str, Any]:  # no head_dim
    sizes = {"intermediate_size": config.expert_ffn_size, "norm_topk_prob": moe_of(config).normalizes}
    return decoder_settings(config, **sizes, **moe_settings(config))


OLMOE = Family("olmoe", "Olmoe", BLOCK, _read, _write)
