"""The DeepSpeed engine: what it needs to see of our experts and groups, its weights and Adam moments, its gradients.

It recognises experts by `isinstance(module, deepspeed.moe.layer.MoE)` and by two attributes of their parameters. It looks up
process groups in tables of `deepspeed.utils.groups`; here they are filled with groups that have a timeout. ZeRO 1 and 2 divide a
parameter's flat values into fragments, one for each rank that shares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from deepspeed import ops
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.real_accelerator import SUPPORTED_ACCELERATOR_LIST
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, distributed, nn
from typing_extensions import override

from nlgmoe.checkpoint.entries import MOMENTS, MOMENTUM, Entry, initial_state
from nlgmoe.layers.moe import MoELayer
from nlgmoe.non_finite import StepGradients, squared_norm
from nlgmoe.parallel.expert_groups import ExpertGroups
from nlgmoe.ranks import sum_over_ranks


class EngineMoELayer(MoELayer, MoE):
    """An `MoELayer` with sharded experts that the engine recognises.

    `MoE.__init__` is never called; the engine reads the members below only.
    """

    @property
    def num_experts(self) -> int:
        """Return the number of experts of the layer on all ranks."""
        return self.router.num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing: the groups exist already."""


def mark_as_deepspeed_moe(layer: MoELayer, groups: ExpertGroups) -> None:
    """Make the engine treat `layer` as its own MoE layer, whose experts are replicated within `groups` only.

    DeepSpeed has no MoE layer without trained experts: frozen ones are marked as weights that each rank has for itself.
    """
    frozen = not any(parameter.requires_grad for parameter in layer.experts.parameters())
    if not frozen:
        layer.__class__ = EngineMoELayer
    for parameter in layer.experts.parameters():
        parameter.group_name = groups.name  # type: ignore[attr-defined]  # DeepSpeed's attributes
        if frozen:
            parameter.ds_optim_param = True  # type: ignore[attr-defined]
        else:
            parameter.allreduce = False  # type: ignore[attr-defined]


def register_groups(groups: ExpertGroups) -> None:
    """Add `groups` to DeepSpeed's tables; DeepSpeed's own have no timeout, so that ranks would wait for a lost one forever."""
    name, ranks_of = groups.name, distributed.get_process_group_ranks
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = groups.parallel
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = groups.data_parallel
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = ranks_of(groups.parallel)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = ranks_of(groups.data_parallel)


def register_world() -> None:
    """Make DeepSpeed use the default group, which has the strategy's timeout, not a copy of it without one."""
    deepspeed_groups._WORLD_GROUP = distributed.group.WORLD


def disable_deepspeed_extensions() -> None:
    """Declare all of DeepSpeed's compiled extensions unavailable: none is used here.

    Otherwise DeepSpeed 0.19.8 checks at start which of them it could compile, with a warning for each if there is no CUDA
    toolkit, and on CPUs compiles one, an all-reduce for inference.
    """
    ops.__compatible_ops__ = {}


def use_device(device: torch.device) -> None:
    """Make DeepSpeed compute on the run's device; 0.19.8 uses the machine's GPU, even if `trainer.accelerator` is cpu."""
    name = device.type
    if name in SUPPORTED_ACCELERATOR_LIST and get_accelerator().device_name() != name:
        module = import_module(f"deepspeed.accelerator.{name}_accelerator")
        set_accelerator(getattr(module, f"{name.upper()}_Accelerator")())


class EngineState:
    """Gather and load the fp32 weights and moments of an engine, by checkpoint entry (`checkpoint/entries.py`).

    At any precision and expert-parallel degree.
    """

    def __init__(self, engine: Any) -> None:
        self._device = engine.device  # of collectives; at the end of a fit Lightning moves parameters to the CPU
        self._optimizer = engine.optimizer
        self._base = engine.optimizer.optimizer  # AdamW, or Muon with it
        self._stepped: dict[Tensor, Tensor] = {}  # parameter -> the flat tensor of its ZeRO group, which AdamW steps on
        flat_groups = self._optimizer.single_partition_of_fp32_groups
        for flat, members in zip(flat_groups, self._optimizer.bit16_groups, strict=True):
            self._stepped |= dict.fromkeys(members, flat)
        groups = self._base.param_groups
        self._muon = {flat for group in groups if group.get("muon") for flat in group["params"]}
        if self.has_moments:
            self._link_moments()

    @staticmethod
    def ranks_of(parameter: Tensor) -> Any:
        """Return the group of ranks that share a parameter."""
        name = getattr(parameter, "group_name", None)
        if name is None:
            return deepspeed_groups._get_data_parallel_group()
        return deepspeed_groups._get_expert_data_parallel_group(name)

    @property
    def has_moments(self) -> bool:
        """Return True once a step has been taken or a checkpoint loaded; before that AdamW has no state."""
        return len(self._base.state) > 0

    def moments_of(self, parameter: Tensor) -> tuple[str, ...]:
        """Return the names of a parameter's moments: AdamW's, or Muon's."""
        return (MOMENTUM,) if self._stepped[parameter] in self._muon else MOMENTS

    def step_of(self, parameter: Tensor) -> Tensor:
        """Return AdamW's number of steps of a parameter."""
        step: Tensor = self._base.state[self._stepped[parameter]]["step"]
        return step

    def fragment(self, parameter: Tensor, key: str | None) -> tuple[int, Tensor] | None:
        """Return this rank's shard of a parameter's value (`key` None) or moment, and its offset in the flat parameter."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return None if mapping is None else (mapping.lp_fragment_address.start, mapping.get_hp_fragment(key))

    def gather(self, entry: Entry, key: str | None, owner: int) -> Tensor | None:
        """Return an entry on rank `owner` of the ranks that share it, on the CPU; None on the others. A collective.

        Parameters in fp32. A frozen one, and a buffer, is whole on every rank. `key` names a moment; None: the value.
        """
        ranks = self.ranks_of(entry.parameter)
        if not entry.trained:
            if distributed.get_rank(ranks) != owner:
                return None
            whole = entry.parameter.detach().view(-1)[entry.start : entry.stop].view(entry.shape).cpu().clone()
            return whole.float() if isinstance(entry.parameter, nn.Parameter) else whole
        value = torch.zeros(entry.shape.numel(), device=self._device)
        if (overlap := self._overlap(entry, key)) is not None:
            positions, values = overlap
            value[positions] = values
        distributed.reduce(value, distributed.get_global_rank(ranks, owner), group=ranks)
        return value.cpu().view(entry.shape) if distributed.get_rank(ranks) == owner else None

    def load(self, entry: Entry, key: str | None, value: Tensor) -> None:
        """Copy this rank's shard of an entry into the engine, which has only what is trained."""
        if entry.trained and (overlap := self._overlap(entry, key)) is not None:
            positions, values = overlap
            values.copy_(value.view(-1)[positions])

    def init_moments(self) -> None:
        """Give AdamW its initial state, which it otherwise creates in its first step, so that moments can be loaded."""
        for flat in self._optimizer.single_partition_of_fp32_groups:
            self._base.state[flat] = initial_state(flat, flat in self._muon)
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


def _gradient_fragment(parameter: nn.Parameter) -> Tensor | None:
    """Return the shard of a gradient that ZeRO keeps on this rank, as `safe_get_full_grad` reads it; None if there is none."""
    mapping = getattr(parameter, "_hp_mapping", None)  # a frozen parameter has none
    if mapping is None:
        return None
    fragment: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
    address = mapping.lp_fragment_address
    return fragment.narrow(0, address.start, address.numel) if len(fragment) == parameter.numel() else fragment


def loss_scaler(engine: Any) -> Any:
    """Return fp16's dynamic loss scaler; None in other precisions."""
    return engine.optimizer.loss_scaler if engine.fp16_enabled() else None


class EngineGradients(StepGradients):
    """The gradients of an engine, for all of its steps: their norm before the step, and a way to discard them.

    The engine skips a step whose norm is not finite, as after an fp16 overflow. Here the norm is computed once, before the step;
    the engine is given that norm, or infinity if the step is to be skipped.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(())  # ZeRO keeps the gradients, not the parameters
        self._loss_scaler = loss_scaler(engine)
        self._engine = engine
        self._norm = torch.zeros(())  # of the current step, times the loss scale; infinite if it was discarded
        self._measured = False
        self._patch_zero()

    def of_step(self) -> EngineGradients:
        """Return the gradients of the coming step, after the backward pass of its last micro-batch."""
        self._measured = False
        self._engine.optimizer._wait_for_offload_copies()
        return self

    @override
    def norm(self) -> Tensor:
        if not self._measured:
            squares = self.squared_norms([list(self._engine.module.parameters())])  # [1]
            self._norm, self._measured = sum_over_ranks(squares)[0].sqrt() * self._scale, True
        return self._norm / self._scale

    @override
    def can_lower_loss_scale(self) -> bool | None:
        return None if self._loss_scaler is None else bool(self._loss_scaler.cur_scale > self._loss_scaler.min_scale)

    @override
    def squared_norms(self, components: Sequence[Sequence[nn.Parameter]]) -> Tensor:
        """Return terms of the squared norms: ZeRO shards every gradient over the ranks that share it."""
        device = next(self._engine.module.parameters()).device  # with `offload_optimizer` the gradients are elsewhere
        squares = [
            squared_norm((_gradient_fragment(parameter) for parameter in component), device).to(device)
            for component in components
        ]
        return torch.stack(squares) / self._scale**2

    @property
    def _scale(self) -> float:
        return 1.0 if self._loss_scaler is None else float(self._loss_scaler.cur_scale)

    @override
    def full_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        gradient: Tensor | None = safe_get_full_grad(parameter)
        return gradient

    @override
    def clip(self, norm: float, limit: float) -> None:
        """Give the engine, which clips in its step and reads the norm for each group, a norm on the host."""
        self._norm = torch.tensor(norm * self._scale)

    @override
    def discard(self) -> None:
        """Make the norm infinite: the engine then skips the step."""
        self._norm = torch.full_like(self._norm, torch.inf)

    def _patch_zero(self) -> None:
        """Use the norm computed here, and skip ZeRO's own overflow check, which would read all gradients once more."""
        optimizer = self._engine.optimizer
        optimizer.scaled_global_norm = lambda norm_type=2: self._norm
        optimizer.check_overflow = lambda partition_gradients=True: None
        # With `offload_optimizer` the host would wait for each parameter.
        optimizer.update_offload_overflow_tracker_for_param_grad = lambda parameter: None
        if self._loss_scaler is not None:
            self._loss_scaler.raise_error_at_min_scale = False  # `StepGuard` has handled that before the step
        else:
            optimizer.check_grad_overflow = True  # otherwise ZeRO ignores the norm in bf16
            optimizer._update_scale = lambda overflow: None  # the scale is always 1; this would only repeat a warning
