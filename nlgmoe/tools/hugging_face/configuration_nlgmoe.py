"""`GPTConfig` as `transformers` keeps it, in `config.json`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from nlgmoe.config import GPTConfig

FIELDS = tuple(field.name for field in fields(GPTConfig))
SHA256 = "weights_sha256"  # of each file of weights that was exported with the `config.json`


class NlgmoeConfig(PreTrainedConfig):
    """Every setting of `GPTConfig` under its own name, and under the names that other models of `transformers` give it.

    Args:
        values: settings of `GPTConfig`, `moe` as a dictionary; what is not given, or None, has `GPTConfig`'s default.
            Other settings are those of `transformers`.
    """

    model_type = "nlgmoe"
    attribute_map = {  # noqa: RUF012 (declared by `transformers`)
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "seq_len",
        "intermediate_size": "ffn_hidden_size",
    }

    def __init__(self, **values: Any) -> None:
        for name in FIELDS:
            setattr(self, name, values.pop(name, None))
        values.pop(SHA256, None)  # `save_pretrained` writes other files
        super().__init__(**values)

    def gpt_config(self) -> GPTConfig:
        """The settings as our model takes them.

        Raises:
            ValueError: one of them is out of range.
        """
        given = {name: getattr(self, name) for name in FIELDS}
        return GPTConfig.from_dict({name: value for name, value in given.items() if value is not None})
