"""Expert parallelism: the number of ranks that share a layer's experts, and the experts that each rank holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from nlgmoe.config import GPTConfig
from nlgmoe.validation import require


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
