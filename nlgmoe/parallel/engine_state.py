"""Read and write a DeepSpeed engine's fp32 weights and Adam moments, at any precision and expert-parallel degree.

ZeRO 1 and 2 divide a parameter's flat values into fragments, one for each rank that shares it.
"""

from __future__ import annotations

from typing import Any

import torch
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
        self._base = engine.optimizer.optimizer  # torch's AdamW
        self._stepped: dict[Tensor, Tensor] = {}  # parameter -> the flat tensor of its ZeRO group, which AdamW steps on
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
        step: Tensor = self._base.state[self._stepped[parameter]]["step"]
        return step

    def fragment(self, parameter: Tensor, key: str | None) -> tuple[int, Tensor] | None:
        """Return this rank's part of a parameter's value (`key` None) or moment, and its offset in the flat parameter."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return None if mapping is None else (mapping.lp_fragment_address.start, mapping.get_hp_fragment(key))

    def gather(self, entry: Entry, key: str | None, owner: int) -> Tensor | None:
        """Gather an entry on rank `owner` of the ranks that share it, in fp32 on the CPU; None on the others. A collective."""
        ranks = self.ranks_of(entry.parameter)
        value = torch.zeros(entry.shape.numel(), device=self._device)
        if (overlap := self._overlap(entry, key)) is not None:
            part, values = overlap
            value[part] = values
        distributed.reduce(value, distributed.get_global_rank(ranks, owner), group=ranks)
        return value.cpu().view(entry.shape) if distributed.get_rank(ranks) == owner else None

    def load(self, entry: Entry, key: str | None, value: Tensor) -> None:
        """Copy this rank's part of an entry into the engine, which has no buffers."""
        if entry.trained and (overlap := self._overlap(entry, key)) is not None:
            part, values = overlap
            values.copy_(value.view(-1)[part])

    def init_moments(self) -> None:
        """Give AdamW its initial state, which it otherwise creates in its first step, so that moments can be loaded."""
        for flat in self._optimizer.single_partition_of_fp32_groups:
            self._base.state[flat] = initial_state(flat)
        self._link_moments()

    def _overlap(self, entry: Entry, key: str | None) -> tuple[slice, Tensor] | None:
        """Return the slice of an entry that lies in this rank's fragment, and its values; None if there is none."""
        fragment = self.fragment(entry.parameter, key)
        if fragment is None:
            return None
        start, values = fragment
        first, last = max(start, entry.start), min(start + len(values), entry.stop)
        if first >= last:
            return None
        return slice(first - entry.start, last - entry.start), values[first - start : last - start]

    def _link_moments(self) -> None:
        """Link moments to all groups: DeepSpeed does it once, after the first group's step, when the others have none."""
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()
