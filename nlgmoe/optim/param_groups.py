"""AdamW and its two named parameter groups."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from nlgmoe.roles import DECAYED, role_of
from nlgmoe.validation import require, require_above, require_at_least, require_valid

Component = Literal["router", "experts", "attention", "ffn", "norms", "embeddings"]
_COMPONENTS: dict[Component, str] = {
    "router": r"\.moe\.router\.",
    "experts": r"\.moe\.experts\.",
    "attention": r"\.attention\.(?!\w*norm\.)",
    "ffn": r"\.ffn\.|\.moe\.(mlp|coefficient)\.",
    "norms": r"norm\.",
    "embeddings": r"embedding\.|^head\.",
}  # component -> pattern of the names of its parameters


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW, with the paper's values as defaults.

    Attributes:
        lr: peak learning rate; `schedule` determines the learning rate over tokens.
        betas: decay of the two moments, per optimizer step.
        eps: added to the denominator of the update; at least float32's smallest normal number: smaller ones may be flushed to 0.
        weight_decay: decoupled decay of weight matrices, the embeddings and the router included; biases and norms have none.
        frozen: components of the model that keep their weights: `router`, `experts`, `attention`, `ffn` (dense layers and shared
            MLPs), `norms`, `embeddings` (and the head). They have no gradients and no moments; a frozen
            router's buffers, such as a bias of the choice, stay too.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    frozen: tuple[Component, ...] = ()

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


def is_frozen(name: str, components: Sequence[Component]) -> bool:
    """Return whether a parameter of the GPT, or a checkpoint's entry, belongs to one of the components."""
    return any(re.search(_COMPONENTS[component], name) for component in components)


def freeze(model: nn.Module, components: Sequence[Component]) -> None:
    """Let the parameters of the components have no gradient; before the strategy sees the model.

    Raises:
        SettingError: no parameter is left to train.
    """
    for name, parameter in model.named_parameters():
        if is_frozen(name, components):
            parameter.requires_grad_(False)
    require(
        not components or any(parameter.requires_grad for parameter in model.parameters()),
        f"model.optimizer.frozen={list(components)} leaves no parameter to train; leave a component out",
    )


def build_adamw(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """Build AdamW with the groups `decay` and `no_decay`, which contain the parameters' names for checkpoints.

    Parameters of `config.frozen` are in no group.

    Sharded experts have the attribute `group_name` (DeepSpeed's convention) and form their own groups, because their
    gradients and states are not shared by the same ranks as those of dense parameters.
    """
    groups = defaultdict[tuple[str, bool], list[tuple[str, nn.Parameter]]](list)
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if not is_frozen(name, config.frozen):
                key = getattr(parameter, "group_name", ""), role_of(name, module) in DECAYED
                groups[key].append((name, parameter))
    optimizer = torch.optim.AdamW(
        [
            # DeepSpeed looks up the ranks of a group of experts by its name.
            {"params": parameters, "decays": decay, "moe": bool(ranks)}
            | {"name": ranks or ("decay" if decay else "no_decay")}
            for (ranks, decay), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay if group["decays"] else 0.0
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    # A fused step can unscale fp16 gradients itself, so Lightning refuses to clip them under mixed precision. Disable this:
    # the gradient scaler unscales them, as for any other optimizer.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def _keep_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Restore only the moments, by name: groups and settings are those of this run's configuration."""
    saved = {
        name: index
        for group in state["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }
    groups = [group | {"params": [saved[name] for name in group["param_names"]]} for group in optimizer.param_groups]
    return state | {"param_groups": groups}
