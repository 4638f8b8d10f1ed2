"""Evaluation on several ranks: each rank processes a share of the batches, all get all results, and all fail together.

With expert parallelism a forward pass is collective: all ranks must run equally many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

from nlgmoe.layers.moe import moe_layers
from nlgmoe.model.gpt import GPT
from nlgmoe.validation import RunError

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class LockstepError(RunError):
    """A rank has failed or has called another operation than the others; every rank raises this at the same point."""


class BrokenCollectiveError(RuntimeError):
    """A rank has failed during a collective forward pass; the other ranks wait in it, so the run cannot continue."""


class LockstepRanks:
    """The ranks of the default process group, or a single process without one.

    Args:
        model: the model that the ranks evaluate.

    Attributes:
        collective: True if forward passes are collective.
    """

    def __init__(self, model: GPT) -> None:
        initialized = distributed.is_available() and distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if initialized else (0, 1)
        layers = moe_layers(model)
        self.collective = any(layer.placement.group is not None for layer in layers)
        self._device = model.unembedding.device

    def agree(self, operation: str, error: Exception | None = None) -> None:
        """Check that all ranks are about to run the same operation and none has failed; a collective call."""
        if self.world == 1:
            if error is not None:
                raise error
            return
        gathered = self._gather((operation, None if error is None else describe(error)))
        for rank, (_, message) in enumerate(gathered):
            if message is not None:
                raise LockstepError(f"rank {rank}: {message}") from error
        if len({other for other, _ in gathered}) > 1:
            raise LockstepError(
                "; ".join(f"rank {rank} is about to {other}" for rank, (other, _) in enumerate(gathered))
            )

    def map(
        self, batches: Sequence[Batch], compute: Callable[[Batch], Result], idle: Callable[[], object]
    ) -> list[Result]:
        """Compute every batch on one rank, and return all results in order. All ranks pass the same batches.

        Args:
            batches: rank r computes batches r, r + world, ...
            compute: the function of one batch.
            idle: runs the forward passes of a rank without a batch.
        """
        own: list[Any] = []
        failure: Exception | None = None
        for first in range(0, len(batches), self.world):
            try:
                if first + self.rank < len(batches):
                    own.append(compute(batches[first + self.rank]))
                elif self.collective:
                    idle()
            except Exception as error:
                if self.world == 1:
                    raise
                if self.collective:
                    raise BrokenCollectiveError(describe(error)) from error
                failure = error
                break
        self.agree("gather results", failure)
        gathered = self._gather(own) if self.world > 1 else [own]
        return [gathered[index % self.world][index // self.world] for index in range(len(batches))]

    def any(self, busy: bool) -> bool:
        """Return True if this rank is busy or, where forward passes are collective, any rank is."""
        if not self.collective:
            return busy
        flag = torch.tensor(int(busy), device=self._device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def _gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world
        distributed.all_gather_object(gathered, value)
        return gathered


def describe(error: BaseException) -> str:
    """Format an exception in one line; the type is left out for errors that are written for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
