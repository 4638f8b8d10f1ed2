"""Read and write a DeepSpeed engine's fp32 weights and Adam moments, at any ZeRO stage, precision and expert-parallel degree.

A parameter's flat values are divided into fragments, one for each rank that shares it, under ZeRO 1 and 2; under ZeRO 0 each of
those ranks holds all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, distributed

from nlgmoe.checkpoint.entries import initial_state
from nlgmoe.checkpoint.layout import Entry


class EngineState:
    """Gather and load the fp32 weights and Adam moments of an engine, by checkpoint entry (`checkpoint/layout.py`).

    Args:
        engine: a DeepSpeed engine with its optimizer.
    """

    def __init__(self, engine: Any) -> None:
        self._device = engine.device  # of collectives; at the end of a fit Lightning moves parameters to the CPU
        self._optimizer = engine.optimizer
        self._base = getattr(engine.optimizer, "optimizer", engine.optimizer)  # torch's AdamW
        self._zero = isinstance(engine.optimizer, DeepSpeedZeroOptimizer)
        # Parameter -> the tensor that AdamW steps on: its fp32 copy, or the flat tensor of its ZeRO group.
        self._stepped: dict[Tensor, Tensor] = {}
        if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
            for half, full in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
                self._stepped |= dict(zip(half, full, strict=True))
        elif self._zero:
            flat_groups = self._optimizer.single_partition_of_fp32_groups
            for flat, members in zip(flat_groups, self._optimizer.bit16_groups, strict=True):
                self._stepped |= dict.fromkeys(members, flat)
            if self.has_moments:
                self._link_moments()

    def ranks_of(self, parameter: Tensor) -> Any:
        """Return the group of ranks that share a parameter."""
        name = getattr(parameter, "group_name", None)
        if name is None:
            return deepspeed_groups._get_data_parallel_group()
        return deepspeed_groups._get_expert_data_parallel_group(name)

    @property
    def has_moments(self) -> bool:
        """Return True once a step has been taken or a checkpoint loaded; before that AdamW has no state."""
        return len(self._base.state) > 0

    def step_of(self, parameter: Tensor) -> Tensor:
        """Return AdamW's number of steps of a parameter."""
        step: Tensor = self._base.state[self._stepped.get(parameter, parameter)]["step"]
        return step

    def fragment(self, parameter: Tensor, key: str | None) -> tuple[int, Tensor] | None:
        """Return this rank's part of a parameter's value (`key` None) or moment, and its offset in the flat parameter."""
        if self._zero:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            return None if mapping is None else (mapping.lp_fragment_address.start, mapping.get_hp_fragment(key))
        stepped = self._stepped.get(parameter, parameter)
        return 0, (stepped if key is None else self._base.state[stepped][key]).detach().view(-1)

    def gather(self, entry: Entry, key: str | None, to: int) -> Tensor | None:
        """Gather an entry on rank `to` of the ranks that share it, in fp32 on the CPU; None on the others. A collective."""
        ranks = self.ranks_of(entry.parameter)
        is_destination = distributed.get_rank(ranks) == to
        if not self._zero:
            _, values = self.fragment(entry.parameter, key)  # type: ignore[misc]  # the whole parameter, on every rank
            if not is_destination:
                return None
            return values[entry.start : entry.stop].to("cpu", torch.float32, copy=True).view(entry.shape)
        whole = torch.zeros(entry.shape.numel(), device=self._device)
        if (overlap := self._overlap(entry, key)) is not None:
            part, values = overlap
            whole[part] = values
        distributed.reduce(whole, distributed.get_global_rank(ranks, to), group=ranks)
        return whole.cpu().view(entry.shape) if is_destination else None

    def load(self, entry: Entry, key: str | None, whole: Tensor) -> None:
        """Copy this rank's part of an entry into the engine, which has no buffers."""
        if entry.trained and (overlap := self._overlap(entry, key)) is not None:
            part, values = overlap
            values.copy_(whole.view(-1)[part])

    def init_moments(self) -> None:
        """Give AdamW its initial state, which it otherwise creates in its first step, so that moments can be loaded."""
        if self._zero:
            targets = self._optimizer.single_partition_of_fp32_groups
        else:
            targets = [parameter for group in self._base.param_groups for parameter in group["params"]]
        for target in targets:
            self._base.state[target] = initial_state(target)
        if self._zero:
            self._link_moments()

    def _overlap(self, entry: Entry, key: str | None) -> tuple[slice, Tensor] | None:
        """Return the slice of an entry that lies in this rank's fragment, and its values; None if there is none."""
        found = self.fragment(entry.parameter, key)
        if found is None:
            return None
        start, values = found
        first, last = max(start, entry.start), min(start + len(values), entry.stop)
        if first >= last:
            return None
        return slice(first - entry.start, last - entry.start), values[first - start : last - start]

    def _link_moments(self) -> None:
        """Link moments to all groups: DeepSpeed does it once, after the first group's step, when the others have none."""
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()
