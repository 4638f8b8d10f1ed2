"""Convert the tensors of a model and an optimizer to checkpoint entries, which have a name and hold one expert each, and back."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from nlgmoe.validation import RunError

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state per value; `step` is one number per parameter
MOMENTUM = "momentum_buffer"  # Muon's, whose groups have `muon`
_STACK = re.compile(r"(?P<experts>.*\.moe\.experts)\.(?P<parameter>\w+)")  # a stacked parameter of `layers/experts.py`
EXPERT = re.compile(r"(?P<experts>.*\.moe\.experts)\.(?P<expert>\d+)\.(?P<parameter>\w+)")  # its entry for one expert


def split_experts(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace each stack `...experts.expand_weight` by one entry per expert, `...experts.3.expand_weight`."""
    split: dict[str, Tensor] = {}
    for name, value in entries.items():
        if (match := _STACK.fullmatch(name)) and value.dim() > 0:
            split |= {
                f"{match['experts']}.{expert}.{match['parameter']}": value[expert] for expert in range(len(value))
            }
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
        weights: every parameter by name.
    """
    states: dict[str, dict[str, Tensor]] = {
        name: state["state"].get(index) or initial_state(weights[name], group.get("muon", False))
        for group in state["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }
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
    numbered, index = [], 0
    for group in groups:
        numbered.append({**group, "params": list(range(index, index + len(group["param_names"])))})
        kinds = {MOMENTUM} if group.get("muon") else {"step", *MOMENTS}
        for name in group["param_names"]:
            moments = {moment: values[name] for moment, values in by_moment.items() if name in values}
            # The optimizer would restart this parameter at step 0.
            if by_moment and (lacking := sorted(kinds - moments.keys())):
                raise RunError(f"the optimizer's state lacks {lacking[0]} of {name}; use another checkpoint")
            if moments:
                state[index] = moments
            index += 1
    return {"state": state, "param_groups": numbered}
