"""Expert-parallel degree of each layer, its process groups, and the experts of each rank.

A layer of degree d is sharded over d consecutive ranks, its expert-parallel group. The ranks that hold the same experts are its
expert-data-parallel group. On 8 ranks with degree 4: {0 1 2 3} and {4 5 6 7}; {0 4}, {1 5}, {2 6}, {3 7}.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from torch import distributed
from torch.distributed import ProcessGroup

from nlgmoe.config import GPTConfig
from nlgmoe.pyramid import ExpertPlacement, expert_parallel_degree, experts_per_layer, moe_blocks
from nlgmoe.ranks import AllRanksSettingError


@dataclass(frozen=True)
class ExpertGroups:
    """The groups of this rank for one degree."""

    degree: int  # ranks of the expert-parallel group
    parallel: ProcessGroup  # the ranks that hold a layer together and exchange tokens
    data_parallel: ProcessGroup  # the ranks that hold the same experts and average their gradients

    @property
    def name(self) -> str:
        """Return DeepSpeed's name of the groups."""
        return f"ep_size_{self.degree}"


def layer_degrees(config: GPTConfig, world_size: int, limit: int, model_name: str = "model") -> dict[int, int]:
    """Return the degree of each MoE block, by block number; empty for a dense model."""
    if limit > world_size:
        raise AllRanksSettingError(
            f"trainer.strategy.expert_parallel_size={limit} is above the number of ranks, {world_size}; lower it to "
            f"{world_size}, or run on more devices"
        )
    experts = moe_blocks(config)
    degrees = {block: expert_parallel_degree(count, world_size, limit) for block, count in experts.items()}
    if limit > 1 and degrees and max(degrees.values()) == 1:
        counts = ", ".join(map(str, sorted(set(experts.values()))))
        raise AllRanksSettingError(
            f"trainer.strategy.expert_parallel_size={limit} cannot shard a layer of the {model_name}: no number from 2 to "
            f"{limit} divides both its number of experts ({counts}) and the number of ranks ({world_size}); change one, or use 1"
        )
    return degrees


def make_groups(degree: int, timeout: timedelta) -> ExpertGroups:
    """Make the groups of a degree. A collective: every rank must call it for the same degrees in the same order."""
    world = distributed.get_world_size()
    return ExpertGroups(
        degree,
        _make_group([list(range(first, first + degree)) for first in range(0, world, degree)], timeout),
        _make_group([list(range(first, world, degree)) for first in range(degree)], timeout),
    )


def _make_group(members: list[list[int]], timeout: timedelta) -> ProcessGroup:
    """Make one group for each list of ranks and return this rank's own.

    Groups of one rank need no communicator: PyTorch's fake backend returns the input of a collective, which is its result.
    """
    if len(members[0]) > 1:
        group, _ = distributed.new_subgroups_by_enumeration(members, timeout=timeout)
    else:
        import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)

        group = distributed.new_group([distributed.get_rank()], backend="fake", use_local_synchronization=True)
    assert group is not None
    return group


def expert_placements(
    config: GPTConfig, degrees: dict[int, int], groups: dict[int, ExpertGroups]
) -> dict[int, ExpertPlacement]:
    """Return the experts of this rank in every MoE block, by block number."""
    placements = {}
    for block, degree in degrees.items():
        count = experts_per_layer(config)[block] // degree
        group = groups[degree].parallel if degree > 1 else None
        first = 0 if group is None else distributed.get_rank(group) * count
        placements[block] = ExpertPlacement(first, count, group)
    return placements
