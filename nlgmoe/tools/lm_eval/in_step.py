"""Ranks that evaluate together: each does its share, all get all results, and all fail together.

Where experts are spread over ranks, a forward pass is a conversation: every rank has to make as many as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

from nlgmoe.layers.moe import MoELayer
from nlgmoe.model.gpt import GPT

Work = TypeVar("Work")
Result = TypeVar("Result")


class OutOfStep(ValueError):
    """A rank has failed, or does something else than the others; all ranks raise this, at the same place."""


class Stranded(RuntimeError):
    """A rank has failed in the middle of an exchange of tokens: the others wait for it, and nothing can be agreed on."""


class InStep:
    """All ranks of the default process group; one process if there is none.

    Args:
        model: whose forward passes they make.

    Attributes:
        spread: whether these are conversations.
    """

    def __init__(self, model: GPT) -> None:
        there = distributed.is_available() and distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if there else (0, 1)
        self.spread = any(layer.placement.group is not None for layer in model.modules() if isinstance(layer, MoELayer))
        self._device = model.unembedding.device

    def agree(self, doing: str, error: Exception | None = None) -> None:
        """Say what this rank is about to do, or why it cannot; every rank has to come here in its turn.

        Raises:
            OutOfStep: a rank has failed, or is about to do something else.
        """
        if self.world == 1:
            if error is not None:
                raise error
            return
        found = self._gather((doing, None if error is None else describe(error)))
        for rank, (_, message) in enumerate(found):
            if message is not None:
                raise OutOfStep(f"rank {rank}: {message}") from error
        if len({each for each, _ in found}) > 1:
            raise OutOfStep("; ".join(f"rank {rank} is about to {each}" for rank, (each, _) in enumerate(found)))

    def share(
        self, batches: Sequence[Work], compute: Callable[[Work], Result], idle: Callable[[], object]
    ) -> list[Result]:
        """`compute` of every batch, in their order, each on one rank. All ranks have to have the same batches.

        Args:
            batches: rank r takes the r-th, and every `world`-th after it.
            compute: one batch.
            idle: makes the forward passes of a rank for which no batch is left.

        Raises:
            OutOfStep: a rank has failed.
            Stranded: this one has, while others were waiting for its experts.
        """
        mine: list[Any] = []
        failure: Exception | None = None
        for first in range(0, len(batches), self.world):
            try:
                if first + self.rank < len(batches):
                    mine.append(compute(batches[first + self.rank]))
                elif self.spread:
                    idle()
            except Exception as error:
                if self.world == 1:
                    raise
                if self.spread:
                    raise Stranded(describe(error)) from error
                failure = error
                break
        self.agree("share", failure)
        shares = self._gather(mine) if self.world > 1 else [mine]
        return [shares[index % self.world][index // self.world] for index in range(len(batches))]

    def anyone(self, busy: bool) -> bool:
        """Whether any rank is `busy`, where that matters: where a forward pass takes all of them."""
        if not self.spread:
            return busy
        answer = torch.tensor(int(busy), device=self._device)
        distributed.all_reduce(answer, distributed.ReduceOp.MAX)
        return bool(answer)

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, value)
        return found


def describe(error: BaseException) -> str:
    """An exception in a line; one that was raised to tell the user something is its own message."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
