"""What the DeepSpeed engine needs to see of our experts.

The engine finds experts by `isinstance(module, deepspeed.moe.layer.MoE)` and by two attributes of their parameters. It keeps
its process groups in tables of `deepspeed.utils.groups`, which are filled here with groups that have a timeout.
"""

from __future__ import annotations

from datetime import timedelta

from deepspeed import ops
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as deepspeed_groups
from torch import distributed

from nlgmoe.layers.moe import MoELayer
from nlgmoe.parallel.expert_groups import ExpertGroups


class EngineMoELayer(MoELayer, MoE):
    """An `MoELayer` whose experts are spread over ranks, as the engine recognises one.

    Nothing of `MoE` runs: its `__init__` is never called, and these are all the attributes the engine reads.
    """

    @property
    def num_experts(self) -> int:
        """Experts of the layer on all ranks."""
        return self.router.num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Nothing: the groups were made before the model."""


def present_to_engine(layer: MoELayer, groups: ExpertGroups) -> None:
    """Let the engine see `layer` as one of its own, and its experts as shared by the ranks of `groups` only."""
    layer.__class__ = EngineMoELayer
    for parameter in layer.experts.parameters():
        parameter.allreduce = False  # type: ignore[attr-defined]  # DeepSpeed's marks
        parameter.group_name = groups.name  # type: ignore[attr-defined]


def register_groups(groups: ExpertGroups) -> None:
    """Enter `groups` into DeepSpeed's tables (its own carry no timeout, so that a lost rank would hang the others)."""
    name, ranks_of = groups.name, distributed.get_process_group_ranks
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = groups.parallel
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = groups.data_parallel
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = ranks_of(groups.parallel)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = ranks_of(groups.data_parallel)


def use_plain_collectives() -> None:
    """Declare all of DeepSpeed's extensions unavailable: nothing here uses one.

    Otherwise DeepSpeed tries at start which of them it could compile, with a warning for each where there is no CUDA toolkit,
    and on CPUs compiles one, an all-reduce for inference.
    """
    ops.__compatible_ops__ = {}


def look_up_collectives_late() -> None:
    """Let DeepSpeed find the functions of `torch.distributed` when it calls them, for who times or counts them."""
    backend = deepspeed_comm.cdb
    backend.all_gather_function = lambda *args, **kwargs: distributed.all_gather_into_tensor(*args, **kwargs)
    backend.reduce_scatter_function = lambda *args, **kwargs: distributed.reduce_scatter_tensor(*args, **kwargs)


def register_world(timeout: timedelta) -> None:
    """DeepSpeed's copy of the world group, with a timeout."""
    if deepspeed_groups._WORLD_GROUP is None:
        ranks = list(range(distributed.get_world_size()))
        deepspeed_groups._WORLD_GROUP = distributed.new_group(ranks, timeout=timeout)
