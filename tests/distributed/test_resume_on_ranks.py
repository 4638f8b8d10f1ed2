"""What ranks resume, and how they read it: rank 0 decides, each entry is read once, and what fails is an error of all."""

import shutil
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

from nlgmoe.checkpoint.reading import Checkpoint, TensorFiles
from nlgmoe.checkpoint.run_checkpoints import checkpoint_path, choose_checkpoint, find_checkpoint, saved_steps
from nlgmoe.parallel.strategy import ExpertParallelStrategy
from nlgmoe.ranks import raise_on_all_ranks
from nlgmoe.run.trainer import run_lock
from nlgmoe.validation import RunError
from tests.support.jobs import error_of
from tests.support.run_folders import make_trainer, module
from tests.support.spawn import spawn
from tests.support.synthetic import SyntheticData

READ = TensorFiles.read


def fit(folder: Path, ranks: int, steps: int = 4) -> int:
    """Train, saving every second step; the step at which this rank has begun."""
    strategy = ExpertParallelStrategy(expert_parallel_size=2, timeout_seconds=60)
    trainer = make_trainer(folder, save={"every_n_steps": 2}, strategy=strategy, devices=ranks, max_steps=steps)
    begun: list[int] = []
    trainer.callbacks[-1].on_train_start = lambda trainer, module: begun.append(trainer.global_step)  # type: ignore[attr-defined]
    trainer.fit(module(), datamodule=SyntheticData(micro_batch_size=2), ckpt_path="auto")
    return begun[0]


def stale(*steps: int) -> Any:
    """Rank 1 alone sees these checkpoints in every folder."""
    seen = (lambda folder: list(steps)) if distributed.get_rank() == 1 else saved_steps
    return patch.multiple("nlgmoe.checkpoint.run_checkpoints", saved_steps=seen)


def reads(read: Callable[[TensorFiles, str], torch.Tensor]) -> Any:
    return patch.object(TensorFiles, "read", read)


def job(folder: Path, ranks: int) -> dict[str, Any]:
    """All runs of this rank, since a process's start takes seconds."""
    found: dict[str, Any] = {"new": fit(folder, ranks)}
    rank, group = distributed.get_rank(), distributed.group.WORLD
    found["timeout"] = group._get_backend(torch.device("cpu")).options._timeout  # type: ignore[union-attr]
    with stale(2):
        found["chosen"] = choose_checkpoint(folder).path
    with raise_on_all_ranks():
        if rank == 0:
            shutil.copytree(folder, folder.parent / "damaged")
            file = next(checkpoint_path(folder.parent / "damaged", 4).glob("optimizer-00001-*"))
            file.write_bytes(file.read_bytes()[:-1] + b"\1")
    found["valid"] = choose_checkpoint(folder.parent / "damaged").path
    read: list[str] = []

    def note(files: TensorFiles, name: str) -> torch.Tensor:
        read.append(name)
        return READ(files, name)

    with (
        stale(),
        reads(note),
        patch("nlgmoe.run.trainer.saved_steps", (lambda folder: []) if rank == 1 else saved_steps),
    ):
        found["resumed"] = fit(folder, ranks, steps=5)
    found["read"] = read
    found["elsewhere"] = error_of(lambda: find_checkpoint(folder / "nowhere" if rank == 1 else folder))
    with run_lock(folder) if rank == 0 else nullcontext(), patch("nlgmoe.run.trainer.LOCK_SECONDS", 0.1):
        found["locked"] = error_of(lambda: fit(folder, ranks))
    with patch("nlgmoe.run.trainer.PATIENCE", 0.1):
        found["local"] = error_of(lambda: fit(folder / "local" if rank == 1 else folder, ranks))

    def fail(files: TensorFiles, name: str) -> torch.Tensor:
        if rank == 1:
            raise RunError(f"{name} is damaged")
        return READ(files, name)

    with reads(fail):
        found["damaged"] = error_of(lambda: fit(folder, ranks, steps=6))

    def hang(files: TensorFiles, name: str) -> torch.Tensor:
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
        if rank == 1:
            time.sleep(4)
        return READ(files, name)

    with reads(hang), pytest.raises(RuntimeError) as ended:
        fit(folder, ranks, steps=6)
    found["hung"] = str(ended.value)
    return found


def results(ranks: int, folder: Path) -> list[dict[str, Any]]:
    run = folder / "run"
    return [result | {"folder": run} for result in spawn(ranks, job, run, ranks, folder=folder)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results(2, tmp_path_factory.mktemp("resumed"))


def test_resume_point_of_all_ranks_is_decided_by_rank_0(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert (rank["new"], rank["resumed"]) == (0, 4)
        assert rank["chosen"] == checkpoint_path(rank["folder"], 4)
        assert rank["valid"] == checkpoint_path(rank["folder"].parent / "damaged", 2)


def test_resume_reads_each_entry_on_one_rank(found: list[dict[str, Any]]) -> None:
    path = checkpoint_path(found[0]["folder"], 4)
    entries = [name for kind in ("model", "optimizer") for name in Checkpoint(path).tensors(kind).shapes]
    assert Counter(name for rank in found for name in rank["read"]) == Counter(entries)
    assert all(rank["read"] for rank in found)


def test_resume_error_of_one_rank_is_one_line_of_all(found: list[dict[str, Any]]) -> None:
    for rank in found:
        folder = rank["folder"]
        assert rank["locked"].startswith(f"another process trains in trainer.default_root_dir={folder}:")
        assert rank["local"].startswith(f"rank 1: trainer.default_root_dir={folder}/local on ")
        assert "lacks checkpoints/step-5.ckpt, which rank 0 has there: all ranks must share" in rank["local"]
        assert f"no checkpoint at {folder}/nowhere/checkpoints/step-5.ckpt: it does not exist" in rank["elsewhere"]
        assert rank["damaged"].startswith("rank 1: ") and rank["damaged"].endswith(" is damaged")
    assert not list(found[0]["folder"].glob(".shared*"))


def test_resume_ends_all_ranks_within_the_timeout_where_one_hangs(found: list[dict[str, Any]]) -> None:
    assert all(rank["timeout"] == timedelta(seconds=60) for rank in found)
    assert "Timed out waiting 2000ms" in found[0]["hung"]


def test_resume_on_four_ranks(tmp_path: Path) -> None:
    """Four, of which two share an expert. Nightly."""
    found = results(4, tmp_path)
    test_resume_point_of_all_ranks_is_decided_by_rank_0(found)
    test_resume_reads_each_entry_on_one_rank(found)
    test_resume_error_of_one_rank_is_one_line_of_all(found)
    test_resume_ends_all_ranks_within_the_timeout_where_one_hangs(found)
