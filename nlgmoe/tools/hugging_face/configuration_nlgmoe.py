"""`GPTConfig` as a configuration class of `transformers`, stored in `config.json`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from transformers import PreTrainedConfig

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.pyramid import experts_per_layer

DEFAULTS = {field.name: None if field.default is MISSING else field.default for field in fields(GPTConfig)}
FIELDS = tuple(DEFAULTS)


class NlgmoeConfig(PreTrainedConfig):
    """Every setting of `GPTConfig` under its own name, with the usual names of `transformers` as aliases.

    Attributes:
        use_cache: a forward pass returns a cache, unless it says otherwise (default).
        output_router_logits: a forward pass returns the gates' logits and `aux_loss`, and adds `aux_loss` to its loss; false by
            default. Not in the configuration of a dense model, by which trainers know a mixture of experts.
        router_aux_loss_coef: weight of `aux_loss` in the loss; by default `moe.loss_coeff` (1 if that is 0). Not in the
            configuration of a dense model.

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
        for name, default in DEFAULTS.items():
            setattr(self, name, values.pop(name, default))
        self.use_cache = values.pop("use_cache", True)
        if self.moe is not None:
            self.output_router_logits = values.pop("output_router_logits", False)
            coefficient = self.moe.get("loss_coeff", MoEConfig.loss_coeff) or 1.0
            self.router_aux_loss_coef = values.pop("router_aux_loss_coef", coefficient)
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

    @property
    def num_experts(self) -> int:
        """Number of experts of every MoE layer; trainers read it that compute a balance loss from the gates' logits."""
        counts = [] if self.moe is None else [count for count in experts_per_layer(self.gpt_config()) if count]
        if len(set(counts)) != 1:
            reason = f"the layers have {counts}" if counts else "the model is dense"
            raise AttributeError(
                f"{type(self).__name__} has no num_experts: {reason}; a trainer that computes a balance loss from router_logits "
                "cannot be used with it (TRL: set router_aux_loss_coef=0.0)"
            )
        return counts[0]

    @property
    def num_experts_per_tok(self) -> int:
        """Experts per token; an `AttributeError` if the model is dense."""
        return self.gpt_config().moe.top_k  # type: ignore[union-attr]

    def gpt_config(self) -> GPTConfig:
        """Return the settings as a `GPTConfig`."""
        given = {name: getattr(self, name) for name in FIELDS}
        return GPTConfig.from_dict({name: value for name, value in given.items() if value is not None})
