"""What two ranks resume, and how they read it: rank 0 decides, each entry is read once, and what fails is an error of both."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import distributed

from nlgmoe.checkpoint.reading import TensorFiles
from nlgmoe.checkpoint.run_checkpoints import checkpoint_path, choose_checkpoint, saved_steps
from nlgmoe.parallel.strategy import ExpertParallelStrategy
from nlgmoe.run.folder import run_lock
from nlgmoe.validation import RunError
from tests.distributed.cells import error_of, spawn
from tests.run.runs import make_trainer, module
from tests.synthetic import SyntheticData

READ = TensorFiles.read


def fit(folder: Path, ckpt_path: str | None = "auto", steps: int = 4) -> int:
    """Train, saving every second step; the step at which this rank has begun."""
    strategy = ExpertParallelStrategy(expert_parallel_size=2, timeout_seconds=60)
    trainer = make_trainer(folder, save={"every_n_steps": 2}, strategy=strategy, devices=2, max_steps=steps)
    begun: list[int] = []
    trainer.callbacks[-1].on_train_start = lambda trainer, module: begun.append(trainer.global_step)  # type: ignore[attr-defined]
    trainer.fit(module(), datamodule=SyntheticData(micro_batch_size=2), ckpt_path=ckpt_path)
    return begun[0]


def stale(*steps: int) -> Any:
    """Rank 1 alone sees these checkpoints in every folder."""
    seen = (lambda folder: list(steps)) if distributed.get_rank() == 1 else saved_steps
    return patch.multiple("nlgmoe.checkpoint.run_checkpoints", saved_steps=seen)


def reads(read: Callable[[TensorFiles, str], torch.Tensor]) -> Any:
    """Read entries of checkpoints with another function."""
    return patch.object(TensorFiles, "read", read)


def job(folder: Path) -> dict[str, Any]:
    """All runs of this rank, since a process's start takes seconds."""
    found: dict[str, Any] = {"new": fit(folder)}
    rank, group = distributed.get_rank(), distributed.group.WORLD
    found["timeout"] = group._get_backend(torch.device("cpu")).options._timeout  # type: ignore[union-attr]
    with stale(2):
        found["chosen"] = choose_checkpoint(folder)
    read: list[str] = []

    def note(files: TensorFiles, name: str) -> torch.Tensor:
        read.append(name)
        return READ(files, name)

    with stale(), reads(note), patch("nlgmoe.run.folder.saved_steps", saved_steps if rank == 0 else lambda folder: []):
        found["resumed"] = fit(folder, steps=5)
    found["read"] = read
    with run_lock(folder) if rank == 0 else nullcontext(), patch("nlgmoe.run.folder.LOCK_SECONDS", 0.1):
        found["locked"] = error_of(lambda: fit(folder))
    with patch("nlgmoe.run.shared_folder.PATIENCE", 0.1):
        found["local"] = error_of(lambda: fit(folder if rank == 0 else folder / "local"))

    def fail(files: TensorFiles, name: str) -> torch.Tensor:
        if rank == 1:
            raise RunError(f"{name} is damaged")
        return READ(files, name)

    with reads(fail):
        found["damaged"] = error_of(lambda: fit(folder, steps=6))

    def hang(files: TensorFiles, name: str) -> torch.Tensor:
        if rank == 1:
            time.sleep(6)
        return READ(files, name)

    distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
    started = time.monotonic()
    with reads(hang), pytest.raises(Exception, match=r"Timed out|[Cc]onnection|timeout") as ended:
        fit(folder, steps=6)
    found["hung"] = time.monotonic() - started, str(ended.value)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has found in the folder `run`."""
    folder = tmp_path_factory.mktemp("resumed")
    return [result | {"folder": folder / "run"} for result in spawn(2, job, folder / "run", folder=folder)]


def test_rank_0_decides_what_all_ranks_resume(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert (rank["new"], rank["resumed"]) == (0, 4)
        assert rank["chosen"] == checkpoint_path(rank["folder"], 4)


def test_every_entry_is_read_by_one_rank(found: list[dict[str, Any]]) -> None:
    path = checkpoint_path(found[0]["folder"], 4)
    entries = [name for kind in ("model", "optimizer") for name in TensorFiles(path, kind).shapes]
    assert Counter(found[0]["read"] + found[1]["read"]) == Counter(entries)
    assert all(len(rank["read"]) > len(entries) / 4 for rank in found)


def test_what_one_rank_cannot_do_is_one_line_of_both(found: list[dict[str, Any]]) -> None:
    for rank in found:
        folder = rank["folder"]
        assert rank["locked"].startswith(f"another process trains in trainer.default_root_dir={folder}:")
        assert rank["local"].startswith(f"rank 1: trainer.default_root_dir={folder}/local on ")
        assert "lacks checkpoints/step-5.ckpt, which rank 0 has there: all ranks must share" in rank["local"]
        assert rank["damaged"].startswith("rank 1: ") and rank["damaged"].endswith(" is damaged")
    assert not list(found[0]["folder"].glob(".shared*"))


def test_a_rank_that_hangs_while_it_reads_ends_the_others_within_the_timeout(found: list[dict[str, Any]]) -> None:
    assert all(rank["timeout"] == timedelta(seconds=60) for rank in found)
    assert found[0]["hung"][0] < 20, found[0]["hung"]
