"""What Muon adds to a step of a rank: products of Newton-Schulz, pieces of cut matrices, and memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch

from nlgmoe.config import GPTConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.muon import DTYPES, batches, newton_schulz_flops
from nlgmoe.optim.optimizer import muon_matrices
from nlgmoe.parallel.muon import Part, divide, moves_of
from nlgmoe.tools.planner.topology import Topology


@dataclass(frozen=True)
class MuonStep:
    """What Muon does on one rank in a step."""

    parameters: int  # that it steps, of those on the rank, before ZeRO divides them
    state: int  # values of its momentum
    flops: int  # of Newton-Schulz
    sent: int  # bytes of pieces of cut matrices, to their owners and back
    memory: int  # bytes: the update, and matrices while they are multiplied


@dataclass(frozen=True)
class _Group:
    """Matrices that `copies` ranks share, as ZeRO lays them out."""

    shapes: list[torch.Size]
    copies: int

    def parts(self, topology: Topology) -> list[Part]:
        """Divide the matrices among the ranks, as DeepSpeed 0.19.8 places parameters: at multiples of 16 bytes."""
        sizes = [shape.numel() for shape in self.shapes]
        if not topology.zero_stage:
            return [Part(shape, 1.0, ((0, 0, size),)) for shape, size in zip(self.shapes, sizes, strict=True)]
        values = 16 // topology.bytes_per.weight
        padded = [-(-size // values) * values for size in sizes]
        offsets = [0, *accumulate(padded)][:-1]
        return divide(self.shapes, offsets, self.shard(topology), "original")

    def shard(self, topology: Topology) -> int:
        """Return the values of a rank's shard."""
        sizes = [shape.numel() for shape in self.shapes]
        if not topology.zero_stage:
            return sum(sizes)
        values = 16 // topology.bytes_per.weight
        return math.ceil((sum(sizes) + sum(-size % values for size in sizes)) / (2 * self.copies)) * 2


def muon_step(config: GPTConfig, topology: Topology, rank: int | None = None) -> MuonStep:
    """Return what Muon does on `rank`; None: the most that any rank does. All 0 without Muon."""
    if topology.muon is None:
        return MuonStep(0, 0, 0, 0, 0)
    ranks = range(topology.gpus) if rank is None else (rank,)
    groups = _groups(config, topology)
    by_rank = {rank: _Sums() for rank in ranks}
    size = DTYPES[topology.muon.ns_precision].itemsize
    for group in groups:
        apart = topology.gpus // group.copies  # ranks from one copy to the next, as DeepSpeed places experts
        sums = [_Sums() for _ in range(group.copies)]
        parts = group.parts(topology)
        for part in parts:
            sums[part.owner].own.append(part.shape)
        for move in moves_of(parts):
            sums[move.holder].sent += move.stop - move.start
            sums[move.part.owner].sent += move.stop - move.start
        for rank in ranks:
            mine = sums[rank // apart if topology.zero_stage else 0]
            total = by_rank[rank]
            total.flops += sum(newton_schulz_flops(shape, topology.muon.ns_steps) for shape in mine.own)
            total.sent += mine.sent * size
            update = group.shard(topology) * size if topology.zero_stage else 0
            total.memory = max(total.memory, update + 2 * mine.sent * size + _products(mine.own, size))
    return MuonStep(
        parameters=sum(shape.numel() for group in groups for shape in group.shapes),
        state=sum(group.shard(topology) for group in groups),
        flops=max(sums.flops for sums in by_rank.values()),
        sent=max(sums.sent for sums in by_rank.values()),
        memory=max(sums.memory for sums in by_rank.values()),
    )


class _Sums:
    """Of one rank: matrices that it owns, values or bytes sent, FLOPs, and the largest memory of a group."""

    def __init__(self) -> None:
        self.own: list[torch.Size] = []
        self.sent = self.flops = self.memory = 0


def _groups(config: GPTConfig, topology: Topology) -> list[_Group]:
    """Return the matrices of a rank: those of all ranks, then those of each degree."""
    with torch.device("meta"):
        matrices = muon_matrices(GPT(config))
    degrees, shapes = topology.degrees(config), dict[int, list[torch.Size]]()
    for name, matrix in matrices.items():
        degree = degrees[int(name.split(".")[1])] if ".moe.experts." in name else 1
        local = [matrix.shape[0] // degree] if matrix.dim() == 3 else []
        shapes.setdefault(degree, []).append(torch.Size([*local, *matrix.shape[-2:]]))
    return [_Group(of_degree, topology.gpus // degree) for degree, of_degree in sorted(shapes.items())]


def _products(shapes: Iterable[torch.Size], size: int) -> int:
    """Return the bytes of the largest matrices that are multiplied together: old, scaled and new ones, two Gram matrices."""
    shapes, most = list(shapes), 0
    for batch in batches(shapes):
        values = sum(shapes[index].numel() for index in batch)
        small, large = sorted(shapes[batch[0]][-2:])
        most = max(most, size * (3 * values + 2 * values * small // large))
    return most
