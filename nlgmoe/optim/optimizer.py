"""The optimizer and its named groups: AdamW, or with it Muon for the matrices of hidden layers (`optim/muon.py`)."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from nlgmoe.optim.muon import Muon, MuonConfig
from nlgmoe.roles import COMPONENTS, DECAYED, Component, component_of, role_of
from nlgmoe.validation import require, require_above, require_at_least, require_valid

# Muon's are the matrices of these modules, which map hidden states to hidden states. AdamW steps embeddings and head (a row for
# each token id, as Jordan and 2502.16982 have it), routers (a table too, with a row for each expert), norms, biases, and the one
# or two rows of a mixing coefficient.
_MUON = re.compile(r"\.attention\.|\.ffn\.|\.moe\.(shared_expert|experts)\.")


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW, with the paper's values as defaults.

    Attributes:
        lr: peak learning rate; `schedule` determines the learning rate over tokens.
        betas: decay of the two moments, per optimizer step.
        eps: added to the denominator of the update; at least float32's smallest normal number: smaller ones may be flushed to 0.
        weight_decay: decoupled decay of weight matrices, the embeddings and the router included; biases and norms have none.
        frozen: components of the model that keep their weights: `router`, `experts`, `attention`, `ffn` (dense layers, shared
            MLPs and mixing coefficients), `norms`, `embeddings` (and the head). They have no gradients and no moments; a frozen
            router's buffers, such as a bias of the choice, stay too.
        lr_scale: factors of the learning rate by component, with the names of `frozen`, such as `{router: 0.25}`; 1 for the
            others. `train/lr` is the rate without them.
        muon: Muon for the matrices of attention, feed-forward layers and experts; null: AdamW for all parameters.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    frozen: tuple[Component, ...] = ()
    lr_scale: dict[str, float] = field(default_factory=dict)
    muon: MuonConfig | None = None

    def __post_init__(self) -> None:
        require_valid(self)
        require_above(0, self, "lr")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas={self.betas} must both be in [0, 1)")
        tiny = torch.finfo(torch.float32).tiny  # below it, a weight without a gradient becomes 0/0
        require(
            self.eps >= tiny,
            f"eps={self.eps} must be at least {tiny:.1e}, float32's smallest normal number; 1e-8 is usual",
        )
        require_at_least(0, self, "weight_decay", remedy="; 0 turns it off")
        for component, factor in self.lr_scale.items():
            scale = f"{component}={factor} in lr_scale"
            require(component in COMPONENTS, f"{scale} names no component; use {', '.join(COMPONENTS)}")
            require(0 < factor < math.inf, f"{scale} must be above 0 and finite")
            is_trained = component not in self.frozen
            require(is_trained, f"{scale} has no effect on what is frozen; remove it here or from frozen")


def freeze(model: nn.Module, components: Sequence[Component]) -> None:
    """Let the parameters of the components have no gradient; before the strategy sees the model."""
    for name, parameter in model.named_parameters():
        if component_of(name) in components:
            parameter.requires_grad_(False)
    require(
        not components or any(parameter.requires_grad for parameter in model.parameters()),
        f"model.optimizer.frozen={list(components)} leaves no parameter to train; leave a component out",
    )


def build_optimizer(model: nn.Module, config: AdamWConfig) -> Optimizer:
    """Build AdamW with the groups `decay` and `no_decay`, which contain the parameters' names for checkpoints.

    Parameters of `config.frozen` are in no group. Parameters with a factor of `config.lr_scale` have groups of their own, and so
    have those that Muon steps.

    Sharded experts have the attribute `group_name` (DeepSpeed's convention) and form their own groups, because their
    gradients and states are not shared by the same ranks as those of dense parameters.
    """
    matrices = {} if config.muon is None else muon_matrices(model)
    groups = defaultdict[tuple[str, bool, bool, float], list[tuple[str, nn.Parameter]]](list)
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if (component := component_of(name)) not in config.frozen:
                factor = config.lr_scale.get(component, 1.0)
                ranks, decays = getattr(parameter, "group_name", ""), role_of(name, module) in DECAYED
                groups[ranks, decays, name in matrices, factor].append((name, parameter))
    adamw = AdamW(
        [
            # DeepSpeed looks up the ranks of a group of experts by its name.
            {"params": parameters, "decays": decays, "moe": bool(ranks)}
            | {"name": ranks or _group_name(decays, muon, factor)}
            | ({"muon": True} if muon else {})
            | ({"lr": config.lr * factor, "lr_scale": factor} if factor != 1 else {})
            for (ranks, decays, muon, factor), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for group in adamw.param_groups:
        group["weight_decay"] = config.weight_decay if group["decays"] else 0.0
    # A fused step can unscale fp16 gradients itself, so Lightning refuses to clip them under mixed precision. Disable this:
    # the gradient scaler unscales them, as for any other optimizer.
    adamw._step_supports_amp_scaling = False
    optimizer = adamw if config.muon is None else Muon(adamw, config.muon)
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    return optimizer


def muon_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that Muon steps if it is used, by name; a weight of another form in an own attention is AdamW's."""
    matrices = {}
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(prefix=prefix, recurse=False):
            dimensions = 3 if component_of(name) == "experts" else 2  # `[E, in, out]`, or `[out, in]`
            is_matrix = weight.dim() == dimensions and not isinstance(module, nn.Embedding)
            if is_matrix and _MUON.search(name) and role_of(name, module) in DECAYED:
                matrices[name] = weight
    return matrices


def _group_name(decays: bool, muon: bool, factor: float) -> str:
    name = "muon" if muon else "decay" if decays else "no_decay"
    return name if factor == 1 else f"{name}, lr x {factor:g}"


def _keep_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Restore only the moments, by name: groups and settings are those of this run's configuration."""
    saved = {
        name: index
        for group in state["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }
    groups = [group | {"params": [saved[name] for name in group["param_names"]]} for group in optimizer.param_groups]
    return state | {"param_groups": groups}
