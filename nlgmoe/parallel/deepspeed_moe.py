"""Present our experts and process groups to the DeepSpeed engine.

The engine recognises experts by `isinstance(module, deepspeed.moe.layer.MoE)` and by two attributes of their parameters. It looks
up process groups in tables of `deepspeed.utils.groups`; here they are filled with groups that have a timeout.
"""

from __future__ import annotations

from datetime import timedelta
from importlib import import_module

import torch
from deepspeed import ops
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.real_accelerator import SUPPORTED_ACCELERATOR_LIST
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as deepspeed_groups
from torch import distributed

from nlgmoe.layers.moe import MoELayer
from nlgmoe.parallel.expert_groups import ExpertGroups


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
    """Make the engine treat `layer` as its own MoE layer, whose experts are replicated within `groups` only."""
    layer.__class__ = EngineMoELayer
    for parameter in layer.experts.parameters():
        parameter.allreduce = False  # type: ignore[attr-defined]  # DeepSpeed's attributes
        parameter.group_name = groups.name  # type: ignore[attr-defined]


def register_groups(groups: ExpertGroups) -> None:
    """Add `groups` to DeepSpeed's tables; DeepSpeed's own have no timeout, so that ranks would wait for a lost one forever."""
    name, ranks_of = groups.name, distributed.get_process_group_ranks
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = groups.parallel
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = groups.data_parallel
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = ranks_of(groups.parallel)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = ranks_of(groups.data_parallel)


def register_world(timeout: timedelta) -> None:
    """Set DeepSpeed's copy of the world group to one with a timeout."""
    if deepspeed_groups._WORLD_GROUP is None:
        ranks = list(range(distributed.get_world_size()))
        deepspeed_groups._WORLD_GROUP = distributed.new_group(ranks, timeout=timeout)


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
