"""dots.llm1: dense blocks first, each head's query and key normalised, DeepSeek-V3's mixtures."""

from __future__ import annotations

from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.llama import BLOCK
from nlgmoe.tools.hugging_face.families.settings import REQUIRED_BY_LAYER, decoder_config, decoder_settings
from nlgmoe.tools.hugging_face.families.sigmoid_moe import SIGMOID_MOE, first_dense, shared_settings, sigmoid_moe


def _read(theirs: Any) -> GPTConfig:
    return decoder_config(theirs, qk_norm="head", moe=sigmoid_moe(theirs, first_dense(theirs)))


def _write(config: GPTConfig) -> dict[str, Any]:
    own = {"head_dim": config.head_size, "sliding_window": None, "max_window_layers": config.num_layers}
    return decoder_settings(config, **own, **shared_settings(config))


DOTS1 = Family("dots1", "Dots1", BLOCK | SIGMOID_MOE, _read, _write, REQUIRED_BY_LAYER)
