"""Initial weights, the same on any number of ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nlgmoe.config import GPTConfig
from nlgmoe.layers.experts import Experts
from nlgmoe.roles import role_of
from nlgmoe.seeding import derive_seed


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
            std = getattr(module, "init_std", None) or config.init_std  # a router may have one of its own
            if role == "project":
                std /= math.sqrt(2 * config.num_layers)
            if isinstance(module, Experts):
                for index in range(len(parameter)):
                    _normal(parameter[index], std, derive_seed(seed, name, module.first + index))
            else:
                _normal(parameter, std, derive_seed(seed, name))


def _normal(tensor: Tensor, std: float, seed: int) -> None:
    """Fill with N(0, std), drawn in fp32 on the CPU so that the numbers do not depend on device and dtype.

    Device and dtype are explicit because Lightning sets other defaults while it builds the model.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    draw = torch.randn(tensor.shape, generator=generator, device="cpu", dtype=torch.float32)
    tensor.copy_(draw * std)
