"""`GPTConfig` as a configuration class of `transformers`, stored in `config.json`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from transformers import PreTrainedConfig

from nlgmoe.config import GPTConfig

DEFAULTS = {field.name: None if field.default is MISSING else field.default for field in fields(GPTConfig)}
FIELDS = tuple(DEFAULTS)
OF_TRANSFORMERS = {"use_cache": True, "output_router_logits": False, "router_aux_loss_coef": 1.0}


class NlgmoeConfig(PreTrainedConfig):
    """Every setting of `GPTConfig` under its own name, with the usual names of `transformers` as aliases.

        use_cache (true): a forward pass returns a cache, unless it says otherwise.
        output_router_logits (false): a forward pass returns the gates' logits and `aux_loss`, and adds `aux_loss` to its loss.
        router_aux_loss_coef (1): weight of `aux_loss` in the loss, besides the coefficients in `moe`, which `aux_loss` includes.

    Args:
        values: those settings, and those of `GPTConfig`, `moe` as a dictionary; a missing setting has `GPTConfig`'s default.
            `vocab_size` has none, so that every `config.json` has it. Other settings are passed to `transformers`.
    """

    model_type = "nlgmoe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (declared by `transformers`)
    attribute_map = {  # noqa: RUF012 (declared by `transformers`)
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "seq_len",
        "tie_word_embeddings": "tied_embeddings",
        "initializer_range": "init_std",
    }

    def __init__(self, **values: Any) -> None:
        for name, default in (DEFAULTS | OF_TRANSFORMERS).items():
            setattr(self, name, values.pop(name, default))
        super().__init__(**values)

    @property
    def intermediate_size(self) -> int:
        """Inner width of the feed-forward layers."""
        return self.gpt_config().ffn_size

    @intermediate_size.setter
    def intermediate_size(self, value: int | None) -> None:
        self.ffn_hidden_size = value

    @property
    def num_key_value_heads(self) -> int:
        """Number of key and value heads."""
        return self.gpt_config().kv_heads

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int | None) -> None:
        self.num_kv_heads = value

    def gpt_config(self) -> GPTConfig:
        """Return the settings as a `GPTConfig`."""
        given = {name: getattr(self, name) for name in FIELDS}
        return GPTConfig.from_dict({name: value for name, value in given.items() if value is not None})
