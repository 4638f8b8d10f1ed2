"""The entries of a checkpoint's `model`, and where they lie in a model whose experts may be spread over ranks.

A dense parameter is one entry; a stack of experts has one for each expert, under the expert's number in the whole layer. So is
a buffer of a router, which no optimizer changes; it is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nlgmoe.layers.experts import Experts
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.router import Router

Shapes = dict[str, torch.Size]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # that a model's weights may be asked for in


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint, and where it lies in this rank's model.

    Attributes:
        name: in the checkpoint.
        stack: name of the parameter that holds it: itself, or a stack of experts.
        leads: whether it stands for its whole stack: AdamW counts one number of steps for all of it.
        parameter: that holds it; or a buffer.
        start: of its values in the flat parameter.
        shape: of the entry.
    """

    name: str
    stack: str
    leads: bool
    parameter: Tensor
    start: int
    shape: torch.Size

    @property
    def trained(self) -> bool:
        """Whether it belongs to a parameter, which the optimizer has moments of."""
        return isinstance(self.parameter, nn.Parameter)

    @property
    def stop(self) -> int:
        """End of its values in the flat parameter."""
        return self.start + self.shape.numel()


def local_entries(model: nn.Module) -> Iterator[Entry]:
    """The entries whose tensors this rank has: all dense ones, and those of the experts that live here."""
    for prefix, module in model.named_modules():
        for name, buffer in _buffers(prefix, module):
            yield Entry(name, name, True, buffer, 0, buffer.shape)
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if not isinstance(module, Experts):
                yield Entry(name, name, True, parameter, 0, parameter.shape)
                continue
            for index in range(len(parameter)):
                expert, shape = module.first + index, parameter.shape[1:]
                one = f"{prefix}.{expert}.{name.rpartition('.')[2]}"
                yield Entry(one, name, expert == 0, parameter, index * shape.numel(), shape)


def entry_shapes(model: nn.Module, buffers: bool = True) -> Shapes:
    """Shape of every entry of the whole model, experts of other ranks included; without `buffers`, of the trained ones."""
    shapes: Shapes = {}
    for prefix, module in model.named_modules():
        if buffers:
            shapes |= {name: buffer.shape for name, buffer in _buffers(prefix, module)}
        if isinstance(module, MoELayer):
            for expert in range(module.router.num_experts):
                for part, stack in module.experts.named_parameters():
                    shapes[f"{prefix}.experts.{expert}.{part}"] = stack.shape[1:]
        if not isinstance(module, Experts):
            for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
                shapes[name] = parameter.shape
    return shapes


def _buffers(prefix: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return names and tensors of a router's own persistent buffers.

    Raises:
        ValueError: another module has one.
    """
    found = [
        (f"{prefix}.{name}", buffer)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
    if found and not isinstance(module, Router):
        raise ValueError(
            f"{found[0][0]}: checkpoints hold buffers of routers alone, and {type(module).__name__} is none; register it on the "
            "Router itself, or with persistent=False"
        )
    return found
