"""Who holds which experts: per-layer expert-parallel degrees, their process groups, and the ranks' shares.

A layer of degree d lives on d consecutive ranks, which form its expert-parallel group; the ranks with the same experts
form its expert-data-parallel group. On 8 ranks, degree 4: {0 1 2 3} and {4 5 6 7}; {0 4}, {1 5}, {2 6}, {3 7}.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from torch import distributed
from torch.distributed import ProcessGroup

from nlgmoe.checkpoint.agreement import AgreedError
from nlgmoe.config import GPTConfig
from nlgmoe.layers.placement import ExpertPlacement
from nlgmoe.model.counting import expert_parameters
from nlgmoe.pyramid import expert_parallel_degree, experts_per_layer


@dataclass(frozen=True)
class ExpertGroups:
    """This rank's groups for one degree.

    Attributes:
        degree: ranks of the expert-parallel group.
        parallel: the ranks that hold a layer together; tokens travel between them.
        data_parallel: the ranks that hold the same experts; those experts' gradients are averaged over them.
    """

    degree: int
    parallel: ProcessGroup
    data_parallel: ProcessGroup

    @property
    def name(self) -> str:
        """What DeepSpeed calls them."""
        return f"ep_size_{self.degree}"


def layer_degrees(config: GPTConfig, world_size: int, limit: int, of: str = "model") -> dict[int, int]:
    """The degree of each MoE block, by block number; empty for a dense model, which has nothing to spread.

    Args:
        config: of the model.
        world_size: ranks of the run.
        limit: the run's `expert_parallel_size`.
        of: what the model is called in errors.

    Raises:
        AgreedError: `limit` is more than there are ranks, or no layer's experts can be spread over them.
    """
    if limit > world_size:
        raise AgreedError(
            f"trainer.strategy.expert_parallel_size={limit} is above the number of ranks, {world_size}; lower it to "
            f"{world_size}, or run on more devices"
        )
    experts = {layer: count for layer, count in enumerate(experts_per_layer(config)) if count}
    degrees = {layer: expert_parallel_degree(count, world_size, limit) for layer, count in experts.items()}
    if limit > 1 and degrees and max(degrees.values()) == 1:
        counts = ", ".join(map(str, sorted(set(experts.values()))))
        raise AgreedError(
            f"trainer.strategy.expert_parallel_size={limit} can spread no layer of the {of}: nothing from 2 to {limit} divides "
            f"both its number of experts ({counts}) and the number of ranks ({world_size}); change one of them, or set it to 1"
        )
    return degrees


def make_groups(degree: int, timeout: timedelta) -> ExpertGroups:
    """Make the groups of a degree; every rank has to call this, in the same order of degrees.

    Only groups of several ranks get a communicator.
    """
    world, rank = distributed.get_world_size(), distributed.get_rank()
    mine: dict[str, ProcessGroup] = {}
    families = {
        "parallel": [range(first, first + degree) for first in range(0, world, degree)],
        "data_parallel": [range(first, world, degree) for first in range(degree)],
    }
    for family, members in families.items():
        if len(members[0]) == 1:
            mine[family] = _group_of_one(rank)
            continue
        for ranks in members:
            group = distributed.new_group(list(ranks), timeout=timeout)
            if rank in ranks:
                mine[family] = group
    return ExpertGroups(degree, **mine)


def _group_of_one(rank: int) -> ProcessGroup:
    """A group of this rank alone, made without the others.

    It is of PyTorch's fake backend, whose collectives return their input: with one rank that is their result.
    """
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)

    group: ProcessGroup = distributed.new_group([rank], backend="fake", use_local_synchronization=True)
    return group


def place(config: GPTConfig, degrees: dict[int, int], groups: dict[int, ExpertGroups]) -> dict[int, ExpertPlacement]:
    """This rank's share of every MoE block, by block number."""
    placements = {}
    for layer, degree in degrees.items():
        count = experts_per_layer(config)[layer] // degree
        if degree == 1:
            placements[layer] = ExpertPlacement(first=0, count=count)
        else:
            group = groups[degree].parallel
            placements[layer] = ExpertPlacement(distributed.get_rank(group) * count, count, group)
    return placements


def describe(config: GPTConfig, degrees: dict[int, int], world_size: int, of: str = "model") -> str:
    """One line per kind of layer (blocks counted from 1): degree, experts of a rank, ranks of an expert."""
    experts = experts_per_layer(config)
    lines = []
    for count, degree in sorted({(experts[layer], degree) for layer, degree in degrees.items()}):
        layers = [layer for layer, other in degrees.items() if (experts[layer], other) == (count, degree)]
        here = count // degree
        size = here * expert_parameters(config) * len(layers)
        blocks = ", ".join(str(layer + 1) for layer in layers)
        lines.append(
            f"blocks {blocks} of the {of}: {count} experts, expert-parallel degree {degree}, {here} a rank "
            f"({size / 1e6:,.1f}M parameters), each on {world_size // degree}"
        )
    return "\n".join(lines)
