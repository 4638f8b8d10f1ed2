"""Base classes of the parts of a model that users replace by classes of their own, named in the configuration.

    attention:
      class_path: nlgmoe.MLAConfig
    moe:
      num_experts: 16
      router:
        class_path: hash_router.HashRouterConfig     # in hash_router.py, in the folder that the run is started from
        init_args:
          seed: 1

A checkpoint names the class and holds no code; reading one imports no module outside `nlgmoe`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from nlgmoe.validation import SettingError, require

if TYPE_CHECKING:
    from torch import Tensor

Settings = TypeVar("Settings", bound=Any)  # a GPTConfig or a MoEConfig
Stack = tuple[int, int, Literal["weight", "output"]]  # inputs, outputs, role of the matrix (`roles.py`)


ROUTER_FIELDS = frozenset(
    {
        *("train_capacity_factor", "eval_capacity_factor", "min_capacity", "token_dropping", "eval_token_dropping"),
        *("random_token_selection", "noise", "second_expert", "groups", "normalize_weights", "gate_scale"),
        *("gate_init_std", "loss_coeff", "z_loss_coeff", "aux_scope"),
    }
)  # fields of MoEConfig that only routers read
ATTENTION_FIELDS = frozenset(
    {"num_kv_heads", "head_dim", "qk_norm", "qkv_bias", "rotary_dim", "attention_scale", "attention_dropout"}
)  # fields of GPTConfig that only attention layers read
# Fields of the model's configuration that may differ from a checkpoint's in its evaluation.
IGNORED_IN_EVALUATION = ROUTER_FIELDS - {"groups", "normalize_weights", "gate_scale"}
IGNORED_IN_EVALUATION |= {"hidden_dropout", "attention_dropout", "init_std"}


@dataclass(frozen=True)
class _Part:
    """Settings of a part that reads some fields of the configuration that names it.

    Attributes:
        known_fields: fields of the configuration that only such parts may read.
        reads_fields: those that the part reads; others are at their defaults in the configuration that it is built from.
        ignored_in_evaluation: fields of the subclass that may differ between training and evaluation.
    """

    known_fields: ClassVar[frozenset[str]]
    reads_fields: ClassVar[frozenset[str]] = frozenset()
    ignored_in_evaluation: ClassVar[frozenset[str]] = frozenset()

    def check_reads_fields(self) -> None:
        """Check the declaration `reads_fields`: a misspelt name would turn a setting off."""
        name = f"{type(self).__name__}.reads_fields"
        if not isinstance(self.reads_fields, frozenset) or "reads_fields" in {field.name for field in fields(self)}:
            raise SettingError(f"{name} must be a frozenset, not annotated; write reads_fields = frozenset({{...}})")
        if unknown := sorted(self.reads_fields - self.known_fields):
            known = ", ".join(sorted(self.known_fields))
            raise SettingError(f"{name} names {', '.join(unknown)}; it may read {known}")

    def check_settings(self, settings: Any) -> None:
        """Check the part against the configuration that names it."""
        self.check_reads_fields()
        self.check(settings)

    @property
    def unread_fields(self) -> frozenset[str]:
        """Known fields that the part does not read."""
        return self.known_fields - self.reads_fields

    def as_read(self, settings: Settings) -> Settings:
        """Return the configuration that names the part, with the fields that it does not read at their defaults."""
        defaults = {field.name: field.default for field in fields(settings) if field.name in self.unread_fields}
        return replace(settings, **defaults)

    def check(self, config: Any) -> None:
        """Check that the part fits the configuration that names it: a router its `MoEConfig`, an attention its `GPTConfig`.

        Raises:
            ValueError: it does not; the message begins with `setting=value`.
        """


@dataclass(frozen=True)
class AttentionConfig(_Part):
    """Settings of an attention layer; a subclass adds its fields. Only `build` must be overridden."""

    known_fields = ATTENTION_FIELDS

    def rotary_size(self, config: Any) -> int:
        """Return how many values of a query and of a key turn with `rope_theta`, an even number."""
        size: int = config.head_size if config.rotary_dim is None else config.rotary_dim
        return size

    def score_widths(self, config: Any) -> tuple[int, int]:
        """Return the widths of a head's query and of its value, from which the FLOPs of scores and weighted sums are counted."""
        return config.head_size, config.head_size

    def saved_bytes(self, config: Any, itemsize: int) -> int | None:
        """Return the bytes that the layer saves for the backward pass for each token, its input included.

        An activation has `itemsize` bytes. None: that is not known, and `nlgmoe inspect` refuses the model.
        """
        return None

    def build(self, config: Any, block: int) -> Any:
        """Make the attention of one block, an `nn.Module` whose `forward(x, context)` maps `[B, T, H] -> [B, T, H]`.

        `config` is the model's `GPTConfig`, `context` a `layers.attention.AttentionContext`. The block's number, counted from 0,
        is the layer's key for `context.cache.extend`.
        """
        raise SettingError(f"{type(self).__name__} has no build(config, block)")


@dataclass(frozen=True)
class RotaryScaling:
    """A change of the frequencies of rotary positions for texts longer than those of training; a subclass adds its fields."""

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return the changed `frequencies`, `[R / 2]` fp32, which are `theta^(-2i / R)`, radians per position."""
        raise SettingError(f"{type(self).__name__} has no scale(frequencies, theta)")


@dataclass(frozen=True)
class RouterConfig(_Part):
    """Settings of a router; a subclass adds its fields."""

    known_fields = ROUTER_FIELDS

    def build(self, config: Any, block: int) -> Any:
        """Make the `layers.router.Router` of one block, counted from 0, which has `pyramid.experts_at(config, block)` experts."""
        raise SettingError(f"{type(self).__name__} has no build(config, block)")


class Linear(Protocol):
    """Apply one stack of weights to rows, each row with its expert's weights."""

    def __call__(self, name: str, x: Tensor, /) -> Tensor:
        """Compute `x @ weight + bias` of the stack `name`, `[M, in] -> [M, out]`."""
        ...


@dataclass(frozen=True)
class ExpertConfig:
    """Settings of an expert network; a subclass adds its fields."""

    def weights(self, hidden_size: int, ffn_size: int) -> dict[str, Stack]:
        """Declare the weight matrices: name -> (inputs, outputs, role), `weight` or `output`.

        Each has a bias unless `GPTConfig.bias` is false. `output` matrices write to the residual stream: their
        initial standard deviation is divided by `sqrt(2 * num_layers)`.
        """
        raise SettingError(f"{type(self).__name__} has no weights(hidden_size, ffn_size)")

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        """Apply the network to rows sorted by expert, `[M, H] -> [M, H]`; `linear(name, x)` applies each row's matrix `name`."""
        raise SettingError(f"{type(self).__name__} has no forward(x, linear)")


Part = AttentionConfig | RotaryScaling | RouterConfig | ExpertConfig
MODEL_PARTS: dict[str, type] = {"attention": AttentionConfig, "rotary_scaling": RotaryScaling}  # fields of `GPTConfig`
MOE_PARTS: dict[str, type] = {"router": RouterConfig, "expert": ExpertConfig}  # fields of `MoEConfig`
_ALL = {**MODEL_PARTS, **MOE_PARTS}
PARTS = (*MODEL_PARTS, *(f"moe.{name}" for name in MOE_PARTS))  # fields that name a class


def require_paper_parts(config: Any, what: str, parts: Iterable[str] = PARTS) -> None:
    """Check that those parts of a model are the paper's; a message begins with `what`, such as `the cost model supports`."""
    for path in parts:
        section, _, name = path.rpartition(".")
        part = getattr(config.moe if section else config, name, None)
        require(part is None, f"{what} only the paper's {name}, not {type(part).__name__} (model.config.{path})")


def without_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `GPTConfig.to_dict` without parts."""
    rest = {name: value for name, value in values.items() if name not in MODEL_PARTS}
    if rest.get("moe"):
        rest["moe"] = {name: value for name, value in rest["moe"].items() if name not in MOE_PARTS}
    return rest


class ForeignCodeError(SettingError):
    """A checkpoint names a class of a module that is not imported."""

    def __init__(self, path: str) -> None:
        module = path.rpartition(".")[0]
        problem = f"the checkpoint's model has {path}, code outside nlgmoe that is not imported"
        remedy = f"import {module} first in Python, or give a command that has the option --allow-code {module}"
        super().__init__(f"{problem}; if you trust it, {remedy}")


def part_to_dict(part: Part) -> dict[str, Any]:
    """Return `class_path` and `init_args`, as JSON reads them again: a tuple is a list."""
    path = f"{type(part).__module__}.{type(part).__qualname__}"
    try:
        return {"class_path": path, "init_args": json.loads(json.dumps(asdict(part)))}
    except TypeError as error:
        raise SettingError(f"{path}: {error}; make settings of numbers, text, lists and dictionaries") from error


def part_from_dict(values: dict[str, Any], base: type) -> Any:
    """Build the object of `part_to_dict`'s values.

    Raises:
        ForeignCodeError: its module is outside `nlgmoe` and not imported.
        ValueError: there is no such class, or it takes other arguments.
    """
    if not isinstance(values, dict) or not isinstance(values.get("init_args", {}), dict):
        raise SettingError(f"{values!r} of the checkpoint names no {base.__name__}")
    path = str(values.get("class_path"))
    module_name, _, name = path.rpartition(".")
    if module_name.split(".")[0] == "nlgmoe":
        # In an exported folder, whose modules are flat files (`tools/hugging_face/export.py`).
        if __name__ != "nlgmoe.parts":
            module_name = f"{__name__.rpartition('.')[0]}.{module_name.replace('.', '_')}"
        with suppress(ModuleNotFoundError):
            importlib.import_module(module_name)
    elif module_name not in sys.modules:
        raise ForeignCodeError(path)
    kind = getattr(sys.modules.get(module_name), name, None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        remedy = f"use the version of {module_name} that trained it"
        raise SettingError(f"{path} of the checkpoint is no {base.__name__}; {remedy}")
    try:
        return kind(**values.get("init_args", {}))
    except TypeError as error:
        problem = f"{path} does not take the checkpoint's settings ({error})"
        raise SettingError(f"{problem}; use the version that trained it") from error


def pack_parts(values: Mapping[str, Any], settings: Any) -> dict[str, Any]:
    """Return the values of a configuration with its parts as `part_to_dict` has them; parts that are null are left out."""
    packed = {name: value for name, value in values.items() if name not in _ALL}
    parts = {name: getattr(settings, name) for name in values.keys() & _ALL.keys()}
    return packed | {name: part_to_dict(part) for name, part in parts.items() if part is not None}


def with_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `pack_parts` with parts as objects."""
    made = {name: part_from_dict(values[name], base) for name, base in _ALL.items() if values.get(name) is not None}
    return {**values, **made}
