"""The fp32 weights and Adam moments of a DeepSpeed engine, whatever the ZeRO stage, precision and expert-parallel degree.

A parameter's values lie flat, in fragments, on the ranks that share it: one fragment each under ZeRO 1 and 2, everything
everywhere under ZeRO 0. `EngineState` brings an entry of the checkpoint (`checkpoint/layout.py`) together, or keeps this rank's
part of it.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, distributed

from nlgmoe.checkpoint.entries import MOMENTS
from nlgmoe.checkpoint.layout import Entry


class EngineState:
    """Reads and writes the fp32 weights and Adam moments of an engine, entry by entry.

    Args:
        engine: a DeepSpeed engine with its optimizer.
    """

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        self._base = getattr(engine.optimizer, "optimizer", engine.optimizer)  # torch's AdamW
        self._zero = isinstance(engine.optimizer, DeepSpeedZeroOptimizer)
        self._master: dict[Tensor, Tensor] = {}
        if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
            for half, full in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
                self._master |= dict(zip(half, full, strict=True))
        # Under ZeRO an AdamW state belongs to a flat group: the flat tensor of each parameter.
        self._flat: dict[Tensor, Tensor] = {}
        if self._zero:
            for flat, members in zip(
                self._optimizer.single_partition_of_fp32_groups, self._optimizer.bit16_groups, strict=True
            ):
                self._flat |= dict.fromkeys(members, flat)
            if self.has_moments:
                self._link_moments()

    def ranks_of(self, parameter: Tensor) -> Any:
        """The ranks that share a parameter."""
        name = getattr(parameter, "group_name", None)
        if name is None:
            return deepspeed_groups._get_data_parallel_group()
        return deepspeed_groups._get_expert_data_parallel_group(name)

    @property
    def has_moments(self) -> bool:
        """Whether a step has been taken (or a checkpoint loaded): before that AdamW has no state."""
        return len(self._base.state) > 0

    def step_of(self, parameter: Tensor) -> Tensor:
        """AdamW's count of steps."""
        step: Tensor = self._base.state[self._owner(parameter)]["step"]
        return step

    def fragment(self, parameter: Tensor, key: str | None) -> tuple[int, Tensor] | None:
        """This rank's part of a parameter's value (`key` None) or moment, and where it starts in the flat parameter."""
        if self._zero:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            return None if mapping is None else (mapping.lp_fragment_address.start, mapping.get_hp_fragment(key))
        owner = self._owner(parameter)
        return 0, (owner if key is None else self._base.state[owner][key]).detach().view(-1)

    def collect(self, entry: Entry, key: str | None, to: int) -> Tensor | None:
        """Bring an entry together on rank `to` of the ranks that share it; None elsewhere. On the CPU, fp32."""
        ranks = self.ranks_of(entry.parameter)
        here = distributed.get_rank(ranks)
        found = self.fragment(entry.parameter, key)
        if not self._zero:  # every rank has all of it
            assert found is not None
            if here != to:
                return None
            return found[1][entry.start : entry.stop].to("cpu", torch.float32, copy=True).view(entry.shape)
        whole = torch.zeros(entry.shape.numel(), device=entry.parameter.device)
        if found is not None:
            start, values = found
            first, last = max(start, entry.start), min(start + len(values), entry.stop)
            if first < last:
                whole[first - entry.start : last - entry.start] = values[first - start : last - start]
        distributed.reduce(whole, distributed.get_global_rank(ranks, to), group=ranks)
        return whole.cpu().view(entry.shape) if here == to else None

    def put(self, entry: Entry, key: str | None, whole: Tensor) -> None:
        """Keep this rank's part of an entry."""
        found = self.fragment(entry.parameter, key)
        if found is None:
            return
        start, values = found
        first, last = max(start, entry.start), min(start + len(values), entry.stop)
        if first < last:
            values[first - start : last - start] = whole.view(-1)[first - entry.start : last - entry.start]

    def make_moments(self) -> None:
        """Give AdamW its (zero) state before its first step, so that it can be filled."""
        targets = self._optimizer.single_partition_of_fp32_groups if self._zero else None
        if targets is None:
            targets = [parameter for group in self._base.param_groups for parameter in group["params"]]
        for target in targets:
            state = self._base.state[target]
            state["step"] = torch.zeros((), dtype=torch.float32, device=target.device)
            state |= {key: torch.zeros_like(target) for key in MOMENTS}
        if self._zero:
            self._link_moments()

    def _link_moments(self) -> None:
        """DeepSpeed does so once, when the first group has stepped: too early for the other groups."""
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def _owner(self, parameter: Tensor) -> Tensor:
        """The tensor under which AdamW keeps a parameter's state."""
        if self._zero:
            return self._flat[parameter]
        return self._master.get(parameter, parameter)
