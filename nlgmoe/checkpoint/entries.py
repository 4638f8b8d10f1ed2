"""The entries of a checkpoint: their names and shapes, and the tensors of a model and an optimizer that they hold.

A dense parameter is one entry. A stack of experts has one entry per expert, numbered within the whole layer, which may be sharded
over ranks. A router's persistent buffer is one entry, equal on all ranks. Buffers and frozen parameters (`requires_grad` false)
have no optimizer state.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nlgmoe.layers.experts import Experts
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.router import Router
from nlgmoe.validation import RunError, SettingError, require

Shapes = dict[str, torch.Size]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # dtypes that a user may load or export weights in
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state per value; `step` is one number per parameter
MOMENTUM = "momentum_buffer"  # Muon's, whose groups have `muon`
_STACK = re.compile(r"(?P<experts>.*\.moe\.experts)\.(?P<parameter>\w+)")  # a stacked parameter of `layers/experts.py`
EXPERT = re.compile(r"(?P<experts>.*\.moe\.experts)\.(?P<expert>\d+)\.(?P<parameter>\w+)")  # its entry for one expert


def dtype_of(precision: str | None) -> torch.dtype | None:
    """Return the dtype of a setting `precision`; None, the stored one, for None."""
    require(precision in (None, *PRECISIONS), f"precision={precision} must be {', '.join(PRECISIONS)} or null")
    return PRECISIONS.get(precision or "")


def split_experts(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace each stack `...experts.up_weight` by one entry per expert, `...experts.3.up_weight`."""
    split: dict[str, Tensor] = {}
    for name, value in entries.items():
        if (match := _STACK.fullmatch(name)) and value.dim() > 0:
            split |= {f"{match['experts']}.{e}.{match['parameter']}": value[e] for e in range(len(value))}
        else:
            split[name] = value
    return split


def join_experts(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `split_experts`."""
    joined: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, value in entries.items():
        if match := EXPERT.fullmatch(name):
            stacks.setdefault(f"{match['experts']}.{match['parameter']}", {})[int(match["expert"])] = value
        else:
            joined[name] = value
    for name, experts in stacks.items():
        if missing := set(range(max(experts) + 1)) - set(experts):
            raise RunError(f"the checkpoint lacks expert(s) {sorted(missing)} of {name}; use another checkpoint")
        joined[name] = torch.stack([experts[index] for index in range(len(experts))])
    return joined


def initial_state(parameter: Tensor, muon: bool = False) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step: AdamW's, or Muon's."""
    if muon:
        return {MOMENTUM: torch.zeros_like(parameter)}
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step} | {moment: torch.zeros_like(parameter) for moment in MOMENTS}


def optimizer_to_entries(
    state: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Split an optimizer's state into named tensors and groups, which refer to parameters by name.

    Args:
        state: the optimizer's. A parameter that never had a gradient has no entry: a callback has frozen it, or all steps were
            skipped.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for group in state["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            states[name] = state["state"].get(index) or initial_state(weights[name], group.get("muon", False))
    entries: dict[str, Tensor] = {}
    for moment in ("step", *MOMENTS, MOMENTUM):
        values = {name: values[moment] for name, values in states.items() if moment in values}
        entries |= {f"{moment}/{name}": value for name, value in split_experts(values).items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    return entries, groups


def optimizer_from_entries(entries: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Undo `optimizer_to_entries`; parameters are numbered in the order of the groups' names."""
    by_moment: dict[str, dict[str, Tensor]] = {}
    for key, value in entries.items():
        moment, _, name = key.partition("/")
        by_moment.setdefault(moment, {})[name] = value
    by_moment = {moment: join_experts(values) for moment, values in by_moment.items()}
    state: dict[int, dict[str, Tensor]] = {}
    numbered, first = [], 0
    for group in groups:
        names = dict(enumerate(group["param_names"], first))
        numbered.append({**group, "params": list(names)})
        first += len(names)
        kinds = {MOMENTUM} if group.get("muon") else {"step", *MOMENTS}
        for index, name in names.items() if by_moment else ():
            state[index] = {moment: values[name] for moment, values in by_moment.items() if name in values}
            if lacking := sorted(kinds - state[index].keys()):  # the optimizer would restart this parameter at step 0
                raise RunError(f"the optimizer's state lacks {lacking[0]} of {name}; use another checkpoint")
    return {"state": state, "param_groups": numbered}


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
        tensors = [*_router_buffers(prefix, module), *module.named_parameters(prefix=prefix, recurse=False)]
        for name, tensor in tensors:
            if not isinstance(module, Experts):
                yield Entry(name, name, True, tensor, 0, tensor.shape)
                continue
            for index in range(len(tensor)):
                expert, shape = module.first + index, tensor.shape[1:]
                entry_name = f"{prefix}.{expert}.{name.rpartition('.')[2]}"
                yield Entry(entry_name, name, expert == 0, tensor, index * shape.numel(), shape)


def entry_shapes(model: nn.Module) -> Shapes:
    """Return the shape of every entry of the whole model, experts of other ranks included."""
    return {name: shape for name, _, shape in _whole_entries(model)}


def optimizer_shapes(model: nn.Module, muon: Collection[str] = ()) -> Shapes:
    """Return the shapes of the optimizer's entries for the whole model.

    Of AdamW: both moments of each trained entry, and a step of each parameter. Of Muon: the momentum of each entry.
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
        if isinstance(module, MoELayer):
            for expert in range(module.router.num_experts):
                for parameter, stack in module.experts.named_parameters():
                    yield f"{prefix}.experts.{expert}.{parameter}", stack, stack.shape[1:]
        if not isinstance(module, Experts):
            tensors = [*_router_buffers(prefix, module), *module.named_parameters(prefix=prefix, recurse=False)]
            yield from ((name, tensor, tensor.shape) for name, tensor in tensors)


def _router_buffers(prefix: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    buffers = [(f"{prefix}.{name}", buffer) for name, buffer in module.named_buffers(recurse=False)]
    if buffers and (not isinstance(module, Router) or module._non_persistent_buffers_set):
        problem = f"{buffers[0][0]}: checkpoints hold persistent buffers of a Router alone"
        remedy = "compute it in forward, or make it a buffer of the Router itself, without persistent=False"
        raise SettingError(f"{problem}; {remedy}")
    return buffers
