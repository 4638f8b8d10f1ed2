"""Search for settings with which a run fits its GPUs, by evaluating the cost model."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.monitoring.hardware import HARDWARE, Hardware
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.planner.cost import Cost, estimate
from nlgmoe.tools.planner.topology import Topology

MORE_GPUS = 1024
"""Maximum number of GPUs in the search for a larger cluster."""


@dataclass(frozen=True)
class Suggestion:
    """A change that makes the run fit.

    Attributes:
        changes: setting -> new value; names are `Topology`'s, and `hardware`.
        cost: cost with the changes.
    """

    changes: dict[str, Any]
    cost: Cost


def suggestions(
    config: GPTConfig, topology: Topology, gpu: Hardware, utilisation: float, limit: int = 4
) -> list[Suggestion]:
    """Return the smallest sets of changes with which `config` fits, ordered by size and then by step time.

    All combinations of ZeRO stage, expert parallelism, checkpointing and micro-batch are tried at the same global batch. A set
    is omitted if a subset of it suffices. If no combination fits, more and larger GPUs are tried.
    """
    found = _by_settings(config, topology, gpu, utilisation) or _by_hardware(config, topology, gpu, utilisation)
    return found[:limit]


def _by_settings(config: GPTConfig, topology: Topology, gpu: Hardware, utilisation: float) -> list[Suggestion]:
    """Return changes on the given GPUs."""
    options: dict[str, list[Any]] = {
        "zero_stage": list(range(topology.zero_stage + 1, 3)) if topology.deepspeed and topology.gpus > 1 else [],
        "expert_parallel_size": _larger_degrees(config, topology),
        "activation_checkpointing": [] if topology.activation_checkpointing else [True],
        "micro_batch_size": _divisors_below(topology.micro_batch_size),
    }
    found = []
    for values in itertools.product(*([None, *values] for values in options.values())):
        changes = {name: value for name, value in zip(options, values, strict=True) if value is not None}
        cost = estimate(config, replace(topology, **changes), gpu, utilisation)
        if cost.fits:
            found.append(Suggestion(changes, cost))
    return _smallest(found)


def _divisors_below(number: int) -> list[int]:
    """Return the divisors of `number` below it, the largest first, found from those up to 2^16."""
    small = [size for size in range(1, min(math.isqrt(number), 2**16) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)} - {number}, reverse=True)


def _larger_degrees(config: GPTConfig, topology: Topology) -> list[int]:
    """Return larger expert-parallel sizes that change some layer's degree."""
    if not topology.deepspeed or config.moe is None:
        return []
    larger, degrees = [], topology.degrees(config)
    most = min(topology.gpus, max(experts_per_layer(config)))  # no degree is above the number of experts
    for size in range(topology.expert_parallel_size + 1, most + 1):
        if (changed := replace(topology, expert_parallel_size=size).degrees(config)) != degrees:
            larger.append(size)
            degrees = changed
    return larger


def _smallest(found: list[Suggestion]) -> list[Suggestion]:
    """Keep the fastest suggestion per set of settings and no supersets; sort by the number of settings."""
    best: dict[frozenset[str], Suggestion] = {}
    for suggestion in sorted(found, key=lambda s: s.cost.time.total):
        best.setdefault(frozenset(suggestion.changes), suggestion)
    kept = [s for names, s in best.items() if not any(other < names for other in best)]
    return sorted(kept, key=lambda s: (len(s.changes), s.cost.time.total))


def _by_hardware(config: GPTConfig, topology: Topology, gpu: Hardware, utilisation: float) -> list[Suggestion]:
    """Return the fewest GPUs of this kind, and of each kind with more memory, with settings that fit."""
    found = []
    larger = [(name, other) for name, other in HARDWARE.items() if other.memory > gpu.memory]
    for name, kind in [("", gpu), *sorted(larger, key=lambda item: item[1].memory)]:
        gpus = topology.gpus if name else topology.gpus * 2
        while gpus <= MORE_GPUS:
            larger_topology = _with_gpus(topology, gpus)
            if fitting := _by_settings(config, larger_topology, kind, utilisation):
                changes = {"hardware": name} if name else {}
                changes |= {key: new for key, new in vars(larger_topology).items() if new != getattr(topology, key)}
                found.append(Suggestion(changes | fitting[0].changes, fitting[0].cost))
                break
            gpus *= 2
    return found


def _with_gpus(topology: Topology, gpus: int) -> Topology:
    """Return `topology` on `gpus` ranks, with the global batch rounded up to a multiple of `gpus`."""
    share = -(-topology.global_batch_size // gpus)
    return replace(
        topology,
        gpus=gpus,
        deepspeed=topology.deepspeed or topology.gpus == 1 < gpus,  # several without it are `ddp`
        global_batch_size=share * gpus,
        micro_batch_size=math.gcd(share, topology.micro_batch_size),
    )
