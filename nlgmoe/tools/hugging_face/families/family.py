"""`Family`: models that one class of `transformers` computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from nlgmoe.config import GPTConfig
from nlgmoe.tools.hugging_face.families.settings import (
    REQUIRED,
    UnsupportedError,
    check_required,
    differing_settings,
)
from nlgmoe.tools.hugging_face.families.tensors import Layout, Table, places
from nlgmoe.validation import RunError


def without_rotary_buffers(name: str) -> str | None:
    """Return a tensor's name; None for a buffer in old files."""
    return None if name.endswith("rotary_emb.inv_freq") else name


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: `model_type` of its `config.json`.
        classes: beginning of the names of its classes.
        table: entry of our checkpoint -> tensors of its files (`tensors.py`).
        read: converts its configuration; raises `UnsupportedError` for a setting that nlgmoe does not compute.
        write: returns settings, of which `read` makes the same model again if the family computes it (what it cannot express it
            may leave out: a model is the family's only if what is read computes the same); null: it is not exported.
        required: values of its settings that nlgmoe computes, of those that `read` does not look at.
        named: returns the name in `table` of a tensor in a file; None: the tensor is left out.
    """

    name: str
    classes: str
    table: Table
    read: Callable[[Any], GPTConfig]
    write: Callable[[GPTConfig], dict[str, Any]] | None
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: REQUIRED)
    named: Callable[[str], str | None] = without_rotary_buffers

    def config(self, values: dict[str, Any], folder: Path) -> GPTConfig:
        """Convert the contents of `config.json`.

        Args:
            values: the contents.
            folder: its folder, for messages.

        Raises:
            ValueError: it is damaged, or has a setting that nlgmoe does not compute.
        """
        for name in ("per_layer_config", "quantization_config"):  # of the first, classes compute settings of all layers
            if values.get(name):
                method = values[name].get("quant_method", "")
                raise RunError(
                    f"{name}{method and '='}{method} of {folder} cannot be imported: nlgmoe does not support it"
                    + ("; name a conversion to bf16" if method else "")
                )
        try:
            theirs = self.config_class.from_dict(values)
        except Exception as error:  # the library's exceptions have many types
            raise RunError(f"{folder}/config.json is damaged ({error}); download or save the model again") from error
        try:
            return self._config_of(theirs)
        except UnsupportedError as problem:
            raise RunError(f"{problem} of {folder} cannot be imported: nlgmoe does not support it") from problem
        except (TypeError, ValueError) as error:
            raise RunError(
                f"{folder}/config.json describes no model: {error}; download or save the model again"
            ) from error

    def settings(self, config: GPTConfig) -> dict[str, Any]:
        """Return the contents of `config.json`, without ids of tokens."""
        assert self.write is not None, f"{self.name} is not exported"
        values = self.write(config)
        made: dict[str, Any] = self.config_class(**values).to_dict()
        # Settings of positions on the top level are for readers of version 4.
        old: dict[str, Any] = {"rope_theta": config.rope_theta}
        if (part := values.get("rope_parameters", {}).get("partial_rotary_factor")) is not None:
            old["partial_rotary_factor"] = part
        if config.rotary_scaling is not None:
            old["rope_scaling"] = values["rope_parameters"]
        return made | values | {"architectures": [f"{self.classes}ForCausalLM"]} | old

    def differences(self, config: GPTConfig) -> list[str]:
        """Return settings, as `name=value`, with which a model computes something else than the family; empty: nothing else.

        Raises:
            UnsupportedError: the family cannot express the model at all.
            ValueError: likewise.
        """
        assert self.write is not None, f"{self.name} is not exported"
        try:
            theirs = self.config_class(**self.write(config))
        except StrictDataclassError as error:  # a check of theirs, such as of hidden_size by heads
            raise UnsupportedError(" ".join(str(error).split())) from error
        made = self._config_of(theirs)
        if config.moe is not None and made.moe is None:
            raise UnsupportedError(f"num_experts={config.moe.num_experts}")
        return differing_settings(config, made)

    def layout(self, config: GPTConfig) -> Layout:
        """Return the tensors of a model's files."""
        return Layout(places(config, self.table), config)

    @property
    def config_class(self) -> Any:
        """The class of its configuration."""
        return getattr(transformers, f"{self.classes}Config")

    def _config_of(self, theirs: Any) -> GPTConfig:
        check_required(theirs, self.required)
        return self.read(theirs)
