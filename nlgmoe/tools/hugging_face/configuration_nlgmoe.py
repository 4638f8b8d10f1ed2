"""`GPTConfig` as a configuration class of `transformers`, stored in `config.json`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from nlgmoe.config import GPTConfig

FIELDS = tuple(field.name for field in fields(GPTConfig))


class NlgmoeConfig(PreTrainedConfig):
    """Every setting of `GPTConfig` under its own name, with the usual names of `transformers` as aliases.

    Args:
        values: settings of `GPTConfig`, `moe` as a dictionary; a missing setting or None means `GPTConfig`'s default. Other
            settings are passed to `transformers`.
    """

    model_type = "nlgmoe"
    attribute_map = {  # noqa: RUF012 (declared by `transformers`)
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "seq_len",
        "intermediate_size": "ffn_hidden_size",
        "tie_word_embeddings": "tied_embeddings",
    }

    def __init__(self, **values: Any) -> None:
        for name in FIELDS:
            setattr(self, name, values.pop(name, None))
        super().__init__(**values)

    def gpt_config(self) -> GPTConfig:
        """Return the settings as a `GPTConfig`."""
        given = {name: getattr(self, name) for name in FIELDS}
        return GPTConfig.from_dict({name: value for name, value in given.items() if value is not None})
