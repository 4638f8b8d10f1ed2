"""Initial weights, the same on any number of ranks."""

import math

import torch
from torch import nn

from nlgmoe.config import GPTConfig
from nlgmoe.layers.experts import Experts
from nlgmoe.roles import role_of
from nlgmoe.seeding import draw_normal, key_of_draws


@torch.no_grad()
def initialise(model: nn.Module, config: GPTConfig, seed: int) -> None:
    """Draw the initial value of every parameter by its role (`roles.py`).

    Each tensor, and each expert of a stack, has its own generator, seeded by its name: ranks that hold other experts draw the
    same values, and dense components do not depend on the experts.
    """
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            role = role_of(name, module)
            if role in ("scale", "bias"):
                parameter.fill_(1 if role == "scale" else 0)
                continue
            key = key_of_draws(name)
            std = getattr(module, "init_std", None) or config.init_std  # a router may have one of its own
            if role == "output":
                std /= math.sqrt(2 * config.num_layers)
            if isinstance(module, Experts):
                for index, expert in enumerate(parameter):
                    expert.copy_(draw_normal(expert.shape, seed, key, module.first + index) * std)
            else:
                parameter.copy_(draw_normal(parameter.shape, seed, key) * std)
