"""The ranks that hold the experts of one MoE layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from nlgmoe.config import GPTConfig


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
