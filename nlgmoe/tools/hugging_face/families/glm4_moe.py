"""GLM-4.5: dense blocks first, half of each head turns, DeepSeek-V3's mixtures.

`attention_bias` concerns queries, keys and values alone.
"""

from __future__ import annotations

from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.llama import BLOCK
from nlgmoe.tools.hugging_face.families.rope import rope_settings
from nlgmoe.tools.hugging_face.families.settings import REQUIRED, decoder_config, decoder_settings
from nlgmoe.tools.hugging_face.families.sigmoid_moe import SIGMOID_MOE, first_dense, shared_settings, sigmoid_moe


def _read(theirs: Any) -> GPTConfig:
    own = {"qkv_bias": theirs.attention_bias, "qk_norm": "head" if theirs.use_qk_norm else None}
    return decoder_config(theirs, partial=True, **own, moe=sigmoid_moe(theirs, first_dense(theirs)))


def _write(config: GPTConfig) -> dict[str, Any]:
    own = {
        "head_dim": config.head_size,
        "attention_bias": config.has_qkv_bias,
        "use_qk_norm": config.qk_norm is not None,
        "num_nextn_predict_layers": 0,
        **rope_settings(config, partial_rotary_factor=config.rotary_size / config.head_size),  # by default 0.5
    }
    return decoder_settings(config, **own, **shared_settings(config))


GLM4_MOE = Family(
    "glm4_moe", "Glm4Moe", BLOCK | SIGMOID_MOE, _read, _write, REQUIRED | {"attention_bias": (False, True)}
)
