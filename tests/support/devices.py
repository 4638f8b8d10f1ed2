"""Time, errors and weights on any device."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


def error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `expected`, or to 1 if that is 0."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / (expected.norm() or 1.0))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, run: Callable[[], object]) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def draw(module: nn.Module, std: float = 0.02) -> None:
    """Draw random weights on the module's device: quick for billions of values, but different on each device."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=std, generator=generator)
        elif name.endswith("weight"):
            nn.init.ones_(parameter)
        else:
            nn.init.zeros_(parameter)
