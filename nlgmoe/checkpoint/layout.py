"""Map checkpoint entries to the parameters of a model whose experts may be sharded over ranks.

A dense parameter is one entry. A stack of experts has one entry per expert, numbered within the whole layer. A router's
persistent buffer is one entry, equal on all ranks. Buffers and frozen parameters (`requires_grad` false) have no optimizer state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nlgmoe.checkpoint.entries import MOMENTS, MOMENTUM
from nlgmoe.checkpoint.reading import REMEDY, TensorFiles
from nlgmoe.differences import list_differences
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.router import Router
from nlgmoe.validation import RunError

Shapes = dict[str, torch.Size]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # dtypes that a user may load or export weights in


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint, as a slice of a flat parameter of this rank's model.

    Attributes:
        name: its name in the checkpoint.
        stack: name of the parameter that contains it: the same name, or a stack of experts.
        holds_step: true for the entry of a stack that stores AdamW's step count of the stack.
        parameter: the parameter or buffer that contains it.
        start: offset of its first value in the flat parameter.
        shape: shape of the entry.
    """

    name: str
    stack: str
    holds_step: bool
    parameter: Tensor
    start: int
    shape: torch.Size

    @property
    def trained(self) -> bool:
        """Return True for parameters with optimizer state, False for buffers and frozen parameters."""
        return self.parameter.requires_grad

    @property
    def stop(self) -> int:
        """Return the offset after its last value in the flat parameter."""
        return self.start + self.shape.numel()

    def copy_(self, value: Tensor) -> None:
        """Copy the values of the entry into the parameter, in its dtype and on its device."""
        self.parameter.view(-1)[self.start : self.stop] = value.view(-1).to(self.parameter)


def local_entries(model: nn.Module) -> Iterator[Entry]:
    """Yield the entries stored on this rank: all dense ones, and those of its own experts."""
    for prefix, module in model.named_modules():
        for name, buffer in _router_buffers(prefix, module):
            yield Entry(name, name, True, buffer, 0, buffer.shape)
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if not isinstance(module, Experts):
                yield Entry(name, name, True, parameter, 0, parameter.shape)
                continue
            for index in range(len(parameter)):
                expert, shape = module.first + index, parameter.shape[1:]
                entry_name = f"{prefix}.{expert}.{name.rpartition('.')[2]}"
                yield Entry(entry_name, name, expert == 0, parameter, index * shape.numel(), shape)


def entry_shapes(model: nn.Module) -> Shapes:
    """Return the shape of every entry of the whole model, experts of other ranks included.

    Args:
        model: the GPT, or this rank's shard of it.
    """
    return {name: shape for name, _, shape in _whole_entries(model)}


def optimizer_shapes(model: nn.Module, muon: Collection[str] = ()) -> Shapes:
    """Return the shapes of the optimizer's entries for the whole model.

    Of AdamW: both moments of each trained entry, and a step of each parameter. Of Muon: the momentum of each entry.

    Args:
        model: the GPT, or this rank's shard of it.
        muon: names of the parameters that Muon steps.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {id(trained[name]) for name in muon if name in trained}
    entries = [(name, shape, id(tensor)) for name, tensor, shape in _whole_entries(model) if tensor.requires_grad]
    shapes = {f"{moment}/{name}": shape for moment in MOMENTS for name, shape, of in entries if of not in matrices}
    shapes |= {f"{MOMENTUM}/{name}": shape for name, shape, of in entries if of in matrices}
    return shapes | {f"step/{name}": torch.Size() for name in trained if name not in muon}


def _whole_entries(model: nn.Module) -> Iterator[tuple[str, Tensor, torch.Size]]:
    """Yield the name of each entry of the whole model, the parameter or buffer of this rank that has its kind, and its shape."""
    for prefix, module in model.named_modules():
        for name, buffer in _router_buffers(prefix, module):
            yield name, buffer, buffer.shape
        if isinstance(module, MoELayer):
            for expert in range(module.router.num_experts):
                for parameter, stack in module.experts.named_parameters():
                    yield f"{prefix}.experts.{expert}.{parameter}", stack, stack.shape[1:]
        if not isinstance(module, Experts):
            for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
                yield name, parameter, parameter.shape


def require_entries(files: TensorFiles, model: Shapes) -> None:
    """Check that a checkpoint has the entries of the model that it describes."""
    if different := list_differences(files.shapes, model):
        raise RunError(f"{files.folder} does not hold the model that it describes: {', '.join(different)}; {REMEDY}")


def _router_buffers(prefix: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    buffers = [(f"{prefix}.{name}", buffer) for name, buffer in module.named_buffers(recurse=False)]
    if buffers and (not isinstance(module, Router) or module._non_persistent_buffers_set):
        raise RunError(
            f"{buffers[0][0]}: checkpoints hold persistent buffers of a Router alone; register it on the Router itself, without "
            "persistent=False"
        )
    return buffers
