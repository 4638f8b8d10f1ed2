"""The pyramid of PR-MoE: the number of experts of each block, and the experts that each rank holds.

The paper finds that experts improve later layers more (section 4.1.1, "Phenomenon-I"; figure 2, left), so
`MoEConfig.num_experts` may grow with depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from nlgmoe.config import GPTConfig
from nlgmoe.validation import require


def experts_at(config: GPTConfig, block: int) -> int:
    """Return the number of experts of block `block` (counted from 0); 0 for a dense block.

    With `expert_interval` 2, blocks 1, 3, 5, ... are MoE positions; the j-th of them has `num_experts[j]`.
    """
    moe = config.moe
    if moe is None or (block + 1) % moe.expert_interval:
        return 0
    if isinstance(moe.num_experts, int):
        return moe.num_experts
    return moe.num_experts[(block + 1) // moe.expert_interval - 1]


def experts_per_layer(config: GPTConfig) -> list[int]:
    """Return `experts_at` of every block, from the first to the last."""
    return [experts_at(config, layer) for layer in range(config.num_layers)]


def experts_per_position(config: GPTConfig) -> list[int]:
    """Return `experts_at` of every MoE position, `num_experts` as a list; empty for a dense model."""
    interval = config.moe.expert_interval if config.moe is not None else config.num_layers + 1
    return experts_per_layer(config)[interval - 1 :: interval]


def moe_blocks(config: GPTConfig) -> dict[int, int]:
    """Return the number of experts of each MoE block, by block number from 0."""
    return {block: count for block, count in enumerate(experts_per_layer(config)) if count}


def student_layers(teacher: GPTConfig, num_layers: int) -> list[int]:
    """Return the teacher's block, from 0, that each block of the paper's student (section 4.2) has the expert count of.

    24 blocks with `num_experts` 10 x 32 and 2 x 64 become 21 with 8 x 32 and 2 x 64. The student leaves out the lowest
    blocks, as many as contain the MoE layers that it lacks, and keeps the order of the others, so that the expert counts are
    those at the top of the pyramid. If the student ends in more dense blocks than the teacher has left, those take the
    teacher's last dense block: 24 blocks become 21 as 4, 5, ..., 23, 22.
    """
    _require_fewer(teacher, num_layers)
    interval = 1 if teacher.moe is None else teacher.moe.expert_interval
    removed = interval * (teacher.num_layers // interval - num_layers // interval)
    experts = experts_per_layer(teacher)
    last_dense = max((layer for layer, count in enumerate(experts) if count == 0), default=0)
    return [layer + removed if layer + removed < teacher.num_layers else last_dense for layer in range(num_layers)]


def evenly_spaced_layers(teacher: GPTConfig, num_layers: int) -> list[int]:
    """Return `num_layers` of the teacher's blocks, from 0, at equal distances: the first, the last and those between."""
    _require_fewer(teacher, num_layers)
    return [round(block * (teacher.num_layers - 1) / max(1, num_layers - 1)) for block in range(num_layers)]


def check_blocks(teacher: GPTConfig, blocks: object, num_layers: int) -> None:
    """Check that this is a list of `num_layers` of the teacher's blocks, from 0, in their order, and not of all."""
    _require_fewer(teacher, num_layers)
    listed = blocks if isinstance(blocks, list) else []
    ordered = [block for block in range(teacher.num_layers) if block in listed]
    names = (
        f"influence, even, upper, or a list of num_layers={num_layers} of the teacher's blocks, from 0, in their order"
    )
    require(listed == ordered and len(listed) == num_layers, f"blocks={blocks} is not {names}; give one of these")


def config_of_blocks(teacher: GPTConfig, blocks: Sequence[int]) -> GPTConfig:
    """Return the configuration of a model that consists of these of the teacher's blocks, in this order.

    The teacher's `expert_interval` stays if it describes them; else it becomes 1, and `num_experts` has a 0 for each dense block.
    """
    moe, counts = teacher.moe, [experts_at(teacher, block) for block in blocks]
    if moe is not None:
        problem = f"num_layers={len(counts)} leaves no MoE block of the teacher's num_experts={moe.num_experts}"
        require(any(counts), f"{problem}: {', '.join(map(str, blocks))} are dense; keep another block")
        interval = moe.expert_interval
        if any(count for block, count in enumerate(counts) if (block + 1) % interval):
            interval = 1
        kept = counts[interval - 1 :: interval]
        equal = kept == [moe.num_experts] * len(kept)
        moe = replace(moe, expert_interval=interval, num_experts=moe.num_experts if equal else kept)
    return replace(teacher, num_layers=len(counts), moe=moe)


def _require_fewer(teacher: GPTConfig, num_layers: int) -> None:
    fewer = 1 <= num_layers < teacher.num_layers
    require(fewer, f"num_layers={num_layers} must be at least 1 and below the teacher's {teacher.num_layers}")


def expert_parallel_degree(num_experts: int, world_size: int, limit: int) -> int:
    """Return the number of ranks that share a layer's experts: the largest divisor of both counts that is at most `limit`.

    Each layer of a pyramid has its own degree (paper, section 4.1.3): on 128 ranks with `limit` 128, layers of 32, 64 and
    128 experts get degrees 32, 64 and 128, and so 4, 2 and 1 copies of each expert.
    """
    numbers = f"num_experts={num_experts}, world_size={world_size} and expert_parallel_size={limit}"
    require(min(num_experts, world_size, limit) >= 1, f"{numbers} must all be at least 1")
    common = math.gcd(num_experts, world_size)
    return max(degree for degree in range(1, min(common, limit) + 1) if common % degree == 0)


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts of a layer that this rank holds.

    The ranks of `group` divide the layer's experts: the first rank holds the first `count`, the next rank the next, and so on.
    The number of ranks is the layer's expert-parallel degree.

    Attributes:
        first: number of the first expert held here.
        count: experts held here.
        group: the ranks (a `torch.distributed.ProcessGroup`); None if this rank holds all experts of the layer.
    """

    first: int
    count: int
    group: Any = None


@runtime_checkable
class PlacesExperts(Protocol):
    """A strategy that divides experts over ranks; `MoEGPTModule` builds its model accordingly."""

    def expert_placements(self, config: GPTConfig, model_name: str = "model") -> Mapping[int, ExpertPlacement]:
        """Return this rank's placement of every MoE block, by block number; `model_name` names the model in logs and errors."""
        ...
