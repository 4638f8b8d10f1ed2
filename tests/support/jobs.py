"""Jobs on ranks: functions `job(cell, ranks, folder)` that every rank runs, and what those of several files share."""

from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint

from nlgmoe.callbacks.run_summary import RunSummary
from nlgmoe.checkpoint.reading import Checkpoint
from tests.support.ranks import Cell

Jobs = dict[int, list[tuple[Callable[..., Any], Cell]]]  # by number of ranks

Found = dict[tuple[Callable[..., Any], str], list[Any]]


def run_all(jobs: list[tuple[Callable[..., Any], Cell]], ranks: int, folder: Path, checkpoint: Path) -> list[Any]:
    """Every job on this rank; those with a parameter `checkpoint` that has no default get it."""
    results = []
    for job, cell in jobs:
        parameter = signature(job).parameters.get("checkpoint")
        needs = parameter is not None and parameter.default is Parameter.empty
        results.append(job(cell, ranks, folder, *([checkpoint] if needs else [])))
    return results


def cases(table: dict[int, list[Cell]]) -> Any:
    pairs = [(ranks, cell) for ranks, cells in table.items() for cell in cells]
    return pytest.mark.parametrize(("ranks", "cell"), pairs, ids=[cell.name for _, cell in pairs])


def error_of(job: Callable[[], Any]) -> str:
    try:
        job()
    except ValueError as error:
        return str(error)
    raise AssertionError("no error was raised")


def allow_fp16() -> None:
    """DeepSpeed says that this CPU has no fp16; it has it, slowly."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True  # type: ignore[method-assign]


def saves_at_start(path: Path) -> Callback:
    return LambdaCallback(on_train_start=lambda trainer, module: trainer.save_checkpoint(path))


def with_state(folder: Path) -> list[Callback]:
    """Callbacks with a state of their own, one of which writes `folder/step=5.ckpt`."""
    return [RunSummary(), ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)]


def assert_equal(found: Path, expected: Path) -> None:
    """Both hold the same entries, of the same values, in fp32 at least."""
    for kind in ("model", "optimizer"):
        copy, original = Checkpoint(found).tensors(kind), Checkpoint(expected).tensors(kind)
        assert copy.shapes == original.shapes
        for name in original.shapes:
            assert torch.equal(copy.read(name).float(), original.read(name).float()), name
