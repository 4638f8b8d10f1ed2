"""Muon under ZeRO: matrices that are cut by the borders of shards are made whole before their update is orthogonalised.

ZeRO lays the parameters of a group one after the other in flat values and gives each rank that shares them a shard of equal
size, so that a matrix, or a stack of experts, may lie in the shards of several ranks. Each rank updates momentum and weights of
its shard, value by value. Only `orthogonal(U)` (`optim/muon.py`) needs whole matrices:

    1  a rank sends its pieces of a cut matrix to the rank that has most of it, the owner            all-to-all
    2  each rank orthogonalises the matrices that it owns and those that are whole in its shard
    3  the owner sends the pieces of the result back                                                 all-to-all

Gradients have been averaged over ranks, and clipped, before. The experts that one rank alone has are never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from nlgmoe.optim.muon import DTYPES, Muon, MuonConfig, batches, orthogonalise, rate_ratio


@dataclass(frozen=True)
class Part:
    """A matrix, or consecutive matrices of a stack that are whole in one shard.

    Attributes:
        shape: `[m, n]`, or `[E, m, n]` of a stack.
        ratio: factor of the learning rate.
        pieces: its values in flat order: rank, and start and stop in that rank's shard; more than one if it is cut.
    """

    shape: torch.Size
    ratio: float
    pieces: tuple[tuple[int, int, int], ...]

    @property
    def owner(self) -> int:
        """Return the rank that has most of it, of several the first."""
        return max(self.pieces, key=lambda piece: piece[2] - piece[1])[0]


def divide(shapes: Sequence[torch.Size], offsets: Sequence[int], shard: int, rule: str) -> list[Part]:
    """Divide parameters, which begin at `offsets` of the flat values, into parts; `shard` is a shard's number of values."""
    parts: list[Part] = []
    for shape, offset in zip(shapes, offsets, strict=True):
        size, stop = shape[-2:].numel(), offset + shape.numel()
        edges = {offset, stop}
        for border in range((offset // shard + 1) * shard, stop, shard):
            first = border - (border - offset) % size  # of the matrix that it cuts
            edges |= {first, first + size} if first < border else {border}
        for start, end in pairwise(sorted(edges)):
            ranks = range(start // shard, (end - 1) // shard + 1)
            pieces = [(rank, max(start - rank * shard, 0), min(end - rank * shard, shard)) for rank in ranks]
            part_shape = torch.Size([(end - start) // size, *shape[-2:]][-len(shape) :])
            parts.append(Part(part_shape, rate_ratio(shape, rule), tuple(pieces)))
    return parts


class Move(NamedTuple):
    """A piece of a cut matrix that its holder sends to the owner, and gets back."""

    part: Part
    holder: int
    start: int  # in the holder's shard
    stop: int


def moves_of(parts: Sequence[Part]) -> list[Move]:
    """Return what is sent in a step, in an order that all ranks have."""
    return [Move(part, *piece) for part in parts for piece in part.pieces if piece[0] != part.owner]


class MatrixShard:
    """The matrices of a group in the shard of this rank.

    Args:
        parts: of the whole group.
        ranks: the ranks that share the group.
        device: the one that multiplies matrices and sends them; offloaded shards are on the host.
    """

    def __init__(self, parts: Sequence[Part], ranks: Any, device: torch.device, config: MuonConfig) -> None:
        self._rank, self._ranks, self._device, self._config = distributed.get_rank(ranks), ranks, device, config
        self._own = [part for part in parts if part.owner == self._rank]
        moves = moves_of(parts)
        self._any_moves = bool(moves)
        self._lent = sorted((move for move in moves if move.holder == self._rank), key=lambda move: move.part.owner)
        self._borrowed = sorted((move for move in moves if move.part.owner == self._rank), key=lambda move: move.holder)

    def orthogonalise_(self, update: Tensor) -> None:
        """Replace this rank's shard of an update by that of its orthogonal matrices, times their factors. A collective."""
        values = update.to(self._device, DTYPES[self._config.ns_precision])
        borrowed: dict[tuple[Part, int], Tensor] = {}  # part, holder -> piece
        if self._any_moves:
            lent = [values[move.start : move.stop] for move in self._lent]
            received = self._exchange(values, lent, [move.part.owner for move in self._lent], self._borrowed)
            borrowed = {move[:2]: piece for move, piece in zip(self._borrowed, received, strict=True)}
        for batch in batches([part.shape for part in self._own]):
            parts = [self._own[index] for index in batch]
            matrices = [self._whole(part, values, borrowed) for part in parts]
            for part, result in zip(parts, orthogonalise(matrices, self._config), strict=True):
                pieces = result.reshape(-1).split([stop - start for _, start, stop in part.pieces])
                for (holder, start, stop), piece in zip(part.pieces, pieces, strict=True):
                    if holder == self._rank:
                        update[start:stop].copy_(piece).mul_(part.ratio)
                    else:
                        borrowed[part, holder] = piece
        if self._any_moves:
            results = [borrowed[move[:2]] for move in self._borrowed]
            received = self._exchange(values, results, [move.holder for move in self._borrowed], self._lent)
            for move, piece in zip(self._lent, received, strict=True):
                update[move.start : move.stop].copy_(piece).mul_(move.part.ratio)

    def _whole(self, part: Part, values: Tensor, borrowed: dict[tuple[Part, int], Tensor]) -> Tensor:
        pieces = [borrowed.get((part, holder), values[start:stop]) for holder, start, stop in part.pieces]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(part.shape)

    def _exchange(
        self, like: Tensor, pieces: Sequence[Tensor], receivers: Sequence[int], coming: Sequence[Move]
    ) -> tuple[Tensor, ...]:
        """Send each piece, sorted by receiver, and return those that come, in their order."""
        ranks = distributed.get_world_size(self._ranks)
        sent, received = [0] * ranks, [0] * ranks
        for piece, receiver in zip(pieces, receivers, strict=True):
            sent[receiver] += len(piece)
        for move in coming:
            received[move.holder if move.part.owner == self._rank else move.part.owner] += move.stop - move.start
        values = like.new_empty(sum(received))
        distributed.all_to_all_single(values, torch.cat([like[:0], *pieces]), received, sent, group=self._ranks)
        return values.split([move.stop - move.start for move in coming])


def shard_matrices(zero: Any) -> None:
    """Give the Muon of DeepSpeed's ZeRO optimizer the matrices in each group's flat values; with AdamW do nothing."""
    muon = zero.optimizer
    if not isinstance(muon, Muon):
        return
    for index, group in enumerate(muon.param_groups):
        if group.get("muon"):
            shapes = [parameter.shape for parameter in zero.round_robin_bit16_groups[index]]
            offsets, shard = zero.round_robin_bit16_offsets[index], zero.partition_size[index]
            parts = divide(shapes, offsets, shard, muon.config.adjust_lr)
            ranks, device = zero.real_dp_process_group[index], zero.round_robin_bit16_groups[index][0].device
            (flat,) = group["params"]
            muon.shards[flat] = MatrixShard(parts, ranks, device, muon.config)
