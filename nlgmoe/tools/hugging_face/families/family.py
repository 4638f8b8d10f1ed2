"""`Family`: models that one class of `transformers` computes.

A model belongs to a family if the family's settings, written and read back, describe a model that computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from nlgmoe.config import GPTConfig
from nlgmoe.layers.attention import attention_config
from nlgmoe.parts import IGNORED_IN_EVALUATION, MOE_PARTS
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.hugging_face.families.settings import REQUIRED, UnsupportedError, check_required
from nlgmoe.tools.hugging_face.families.tensors import Layout, Table
from nlgmoe.validation import RunError, as_yaml


def without_rotary_buffers(name: str) -> str | None:
    """Return a tensor's name; None for a buffer in old files."""
    return None if name.endswith("rotary_emb.inv_freq") else name


@dataclass(frozen=True)
class Family:
    """A family of models."""

    name: str  # `model_type` of its `config.json`
    classes: str  # beginning of the names of its classes
    table: Table  # entry of our checkpoint -> tensors of its files (`tensors.py`)
    # Converts its configuration; raises `UnsupportedError` for a setting that nlgmoe does not compute.
    read: Callable[[Any], GPTConfig]
    # Returns settings, of which `read` makes the same model again if the family computes it (what it cannot express it
    # may leave out: a model is the family's only if what is read computes the same); null: it is not exported.
    write: Callable[[GPTConfig], dict[str, Any]] | None
    # Values of its settings that nlgmoe computes, of those that `read` does not look at.
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: REQUIRED)
    # Returns the name in `table` of a tensor in a file; None: the tensor is left out.
    named: Callable[[str], str | None] = without_rotary_buffers

    def config(self, values: dict[str, Any], folder: Path) -> GPTConfig:
        """Convert the contents of `config.json`; messages name its folder."""
        for name in ("per_layer_config", "quantization_config"):  # of the first, classes compute settings of all layers
            if values.get(name):
                method = values[name].get("quant_method", "")
                raise RunError(
                    f"{name}{method and '='}{method} of {folder} cannot be imported: nlgmoe does not support it"
                    + ("; name a conversion to bf16" if method else "")
                )
        try:
            return self._config_of(self.config_class.from_dict(values))
        except UnsupportedError as problem:
            raise RunError(f"{problem} of {folder} cannot be imported: nlgmoe does not support it") from problem
        except Exception as error:  # the library's exceptions have many types
            raise RunError(f"{folder}/config.json is damaged ({error}); download or save the model again") from error

    def settings(self, config: GPTConfig) -> dict[str, Any]:
        """Return the contents of `config.json`, without ids of tokens."""
        assert self.write is not None, f"{self.name} is not exported"
        values = self.write(config)
        made: dict[str, Any] = self.config_class(**values).to_dict()
        # Settings of positions on the top level are for readers of version 4.
        scaling = None if config.rotary_scaling is None else values["rope_parameters"]
        old: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": scaling}
        if (part := values.get("rope_parameters", {}).get("partial_rotary_factor")) is not None:
            old["partial_rotary_factor"] = part
        return made | values | {"architectures": [f"{self.classes}ForCausalLM"]} | old

    def differences(self, config: GPTConfig) -> list[str]:
        """Return settings, as `name=value`, with which a model computes something else than the family; empty: nothing else.

        Raises a ValueError if the family cannot express the model at all.
        """
        assert self.write is not None, f"{self.name} is not exported"
        try:
            theirs = self.config_class(**self.write(config))
        except StrictDataclassError as error:  # a check of theirs, such as of hidden_size by heads
            raise UnsupportedError(" ".join(str(error).split())) from error
        made = self._config_of(theirs)
        if config.moe is not None and made.moe is None:
            raise UnsupportedError(f"num_experts={config.moe.num_experts}")
        return _differing_settings(config, made)

    def layout(self, config: GPTConfig) -> Layout:
        """Return the tensors of a model's files."""
        return Layout(config, self.table)

    @property
    def config_class(self) -> Any:
        """The class of its configuration."""
        return getattr(transformers, f"{self.classes}Config")

    def _config_of(self, theirs: Any) -> GPTConfig:
        check_required(theirs, self.required)
        return self.read(theirs)


# ---- comparison of two models

# Settings that are compared below, in another form, or not at all.
_REPLACED = (IGNORED_IN_EVALUATION - {"eval_token_dropping"}) | {
    *("vocab_size_multiple", "moe", "expert_interval", "residual_mix"),
    *("ffn_hidden_size", "expert_ffn_size", "shared_ffn_size"),
}


def _computation(config: GPTConfig) -> dict[str, Any]:
    """Return the settings that decide the computation in evaluation, those of `moe` too, by name, with nulls resolved."""
    moe, counts = config.moe, experts_per_layer(config)
    given: dict[str, Any] = config.to_dict()
    given |= given.pop("moe") or {}
    # Parts that are null are not in `given`.
    null = dict.fromkeys((*(field.name for field in fields(config)), *MOE_PARTS))
    values = {name: value for name, value in {**null, **given}.items() if name not in _REPLACED}
    attention = attention_config(config)
    width, _ = attention.score_widths(config)
    values |= {"num_kv_heads": config.kv_heads, "head_dim": config.head_size, "rotary_dim": config.rotary_size}
    values |= {"attention_scale": config.attention_scale or width**-0.5, "num_experts": counts}
    values["qkv_bias"] = config.has_qkv_bias
    values = {name: value for name, value in values.items() if name not in attention.unread_fields}
    if 0 in counts:
        values["ffn_hidden_size"] = config.ffn_size
    if moe is None:
        return values
    values |= {"normalize_weights": moe.normalizes, "expert_ffn_size": config.expert_ffn_size}
    if moe.mlp_type == "residual":
        values |= {"residual_mix": moe.residual_mix, "shared_ffn_size": config.shared_ffn_size}
    if moe.router is not None:
        settings = values["router"]["init_args"]
        read = {name: value for name, value in settings.items() if name not in moe.router.ignored_in_evaluation}
        values["router"] = values["router"] | {"init_args": read}
    return values


def _differing_settings(config: GPTConfig, other: GPTConfig) -> list[str]:
    """Return settings of a model, as `name=value`, with which it computes something else than the other."""
    ours, theirs = _computation(config), _computation(other)
    # A setting that one of them lacks has no meaning there, because of another one that differs, such as `mlp_type`.
    return [f"{name}={_text(ours[name])}" for name in ours if name in theirs and not _equal(ours[name], theirs[name])]


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float | int):  # it may be the reciprocal of a reciprocal
        return math.isclose(value, other, rel_tol=1e-12)
    return bool(value == other)


def _text(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return as_yaml(value)
