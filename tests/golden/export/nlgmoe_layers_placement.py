# nlgmoe/layers/placement.py of nlgmoe 0.1.0, copied by `nlgmoe export`; only its imports are others.
# SPDX-License-Identifier: Apache-2.0
"""Where the experts of one MoE layer live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from .nlgmoe_config import GPTConfig


@dataclass(frozen=True)
class ExpertPlacement:
    """Which experts of a layer this rank holds.

    The ranks of `group` hold the layer's experts together: the first rank the first `count` experts, the next rank the
    next ones, and so on. Their number is the layer's expert-parallel degree.

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
    """A strategy that spreads experts over ranks; `MoEGPTModule` builds its model as it says."""

    def expert_placements(self, config: GPTConfig, of: str = "model") -> Mapping[int, ExpertPlacement]:
        """This rank's share of every MoE block, by block number; `of` says whose, in the log and in errors."""
        ...
