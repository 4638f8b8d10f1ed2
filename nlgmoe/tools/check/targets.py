"""The layers that the words of the command name, among them a module of the user's."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nlgmoe.cli.given_settings import find_class
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.router import build_router
from nlgmoe.layers.routing import Routing
from nlgmoe.parts import ExpertConfig, RouterConfig
from nlgmoe.pyramid import moe_blocks
from nlgmoe.tools.check.layer import Batch, Layer, Output
from nlgmoe.tools.check.own import own_layer
from nlgmoe.tools.planner.topology import read_settings
from nlgmoe.validation import RunError, SettingError, require
from nlgmoe.without_effect import without_effect

KINDS = "RouterConfig, ExpertConfig or nn.Module"


@dataclass(frozen=True)
class ForeignLayer(Layer):
    """A module that takes `x`, and `mask` if its `forward` has one, and returns `y`, or a tuple that begins with `y`.

    A scalar tensor among the others is the auxiliary loss, a `Routing` the routing. Its gate is its child `router` or `gate`.
    """

    factory: Callable[[], nn.Module] | None = None  # makes the module

    def build(self) -> nn.Module:
        assert self.factory is not None
        return self.factory()

    def forward(self, module: nn.Module, batch: Batch) -> Output:
        returned: Any = module(batch.x, **({"mask": batch.mask} if self.takes_mask and batch.mask is not None else {}))
        y, *rest = returned if isinstance(returned, tuple | list) else (returned,)
        if not isinstance(y, Tensor) or y.shape != batch.x.shape:
            kind = list(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise RunError(
                f"forward returns {kind}, not a tensor y of {list(batch.x.shape)} or a tuple that begins with it"
            )
        losses = [value for value in rest if isinstance(value, Tensor) and value.ndim == 0]
        for value in rest:  # values like a loss, which would have no gradient or be ignored
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim > 0 and value.numel() == 1):
                kind = f"a tensor of {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise RunError(f"forward returns {kind} behind y; return a loss as a tensor without dimensions")
        routing = next((value for value in rest if isinstance(value, Routing)), None)
        return Output(y, routing, losses[0] if losses else None)

    def gate_weight(self, module: nn.Module) -> Tensor | None:
        gate = _gate(module)
        shape = (self.num_experts, self.hidden_size)
        tensors = [*gate.parameters(), *gate.buffers()] if isinstance(gate, nn.Module) else [gate]
        return next((tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.shape == shape), None)

    def gate_bias(self, module: nn.Module) -> Tensor | None:
        gate = _gate(module)
        bias = getattr(gate, "bias", None)
        return bias if isinstance(gate, nn.Linear) and isinstance(bias, Tensor) else None


def _gate(module: nn.Module) -> Any:
    return getattr(module, "router", getattr(module, "gate", None))


def find_layers(words: Sequence[str]) -> Sequence[Layer]:
    """Return the layers to test."""
    if all(word.endswith((".yaml", ".yml", ".json")) for word in words):
        return _of_config(" ".join(words), read_settings(words)[0])
    require(len(words) == 1, f"{' '.join(words)}: give YAML files, or one checkpoint or class_path")
    (word,) = words
    if Path(word).is_dir() or word.endswith(".ckpt"):
        return _of_config(word, read_settings(words)[0])
    if "." not in word or os.sep in word:
        raise SettingError(f"{word} is no YAML file, checkpoint or class_path; give one")
    try:
        kind = find_class(word)
    except ValueError as error:
        raise SettingError(f"{word}: {error}") from error
    return _of_class(word, kind)


def _of_config(name: str, config: GPTConfig) -> list[Layer]:
    if line := without_effect(config):
        print(line, file=sys.stderr)
    require(config.moe is not None, f"{name} has no MoE layer; set model.config.moe")
    kinds: dict[type, int] = {}  # of routers -> MoE layers up to the first of this kind
    with torch.device("meta"):
        for number, block in enumerate(moe_blocks(config), 1):
            kinds.setdefault(type(build_router(config, block)), number)
    return [
        own_layer(config, name + f", {kind.__name__}" * (len(kinds) > 1), layers=number)
        for kind, number in kinds.items()
    ]


def _of_class(path: str, kind: Any) -> Sequence[Layer]:
    require(callable(kind), f"{path} is no class and no function; give one that makes a {KINDS}")
    try:
        part = kind()
    except Exception as error:
        raise SettingError(
            f"{path} cannot be made without arguments ({type(error).__name__}: {error}); give a function that makes one, or a "
            "configuration that names it"
        ) from error
    if isinstance(part, Layer):
        return [part]
    if isinstance(part, RouterConfig):
        return _of_router(path, part)
    if isinstance(part, ExpertConfig):
        moe = MoEConfig(8, top_k=2, token_dropping=False, second_expert="argmax", expert=part)
        return [own_layer(GPTConfig(512, moe=moe), path)]
    require(isinstance(part, nn.Module), f"{path} makes a {type(part).__name__}; give a {KINDS}")
    sizes = {name: getattr(part, name, None) for name in ("hidden_size", "num_experts", "top_k")}
    complete = all(isinstance(size, int) for size in sizes.values())
    require(complete, f"{path} makes a module without the attributes {', '.join(sizes)}, three numbers; add them")
    takes_mask = "mask" in inspect.signature(part.forward).parameters
    return [ForeignLayer(path, **sizes, takes_mask=takes_mask, factory=kind)]  # type: ignore[arg-type]


def _of_router(path: str, router: RouterConfig) -> list[Layer]:
    """Return layers with one and with two experts a token, with a capacity and without, as far as the router takes them."""
    layers: list[Layer] = []
    refusals = []
    quiet = {"token_dropping": False, "second_expert": "argmax"}
    dropless = {name: value for name, value in quiet.items() if name in router.reads_fields}
    for top_k, settings in ((1, {}), (2, {}), (2, dropless))[: 3 if dropless else 2]:
        try:
            moe = MoEConfig(8, top_k=top_k, router=router, **settings)  # type: ignore[arg-type]
            layer = own_layer(GPTConfig(512, moe=moe), f"{path}, top_k {top_k}" + ", dropless" * bool(settings))
        except Exception as error:
            refusals.append(str(error))
            continue
        try:
            layer.run(layer.make(), Batch.random(layer, 1, 8))
        except ValueError as error:  # it chooses another number of experts; other errors are for the table
            refusals.append(str(error))
            continue
        except Exception:
            pass
        layers.append(layer)
    if not layers:
        raise SettingError(f"{path} takes no layer of 8 experts and one or two experts a token: {refusals[0]}")
    return layers
