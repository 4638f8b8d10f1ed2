"""One spawn for each number of ranks: the jobs of all files of this folder, one after the other.

A cell is one setting of a run (`Cell` in tests/support/ranks.py), and a job is a function `job(cell, ranks, folder)` that
every rank runs on it. A file lists its jobs by number of ranks as `JOBS`, and its tests read what each rank returned as
`found[job, cell.name]`. To add a cell, add it to the list of the file whose subject it is: test_parity.py has the commonest,
`CELLS`. Six steps are enough; cells of one job have different names.

A job of 1 rank runs in this process, before the spawns. A job that requires a parameter `checkpoint` gets the fixture below.
Only the jobs of files with chosen tests run: one file alone takes less time.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from nlgmoe.callbacks import ExpertLoad
from tests.support.cells import ALONE
from tests.support.jobs import Found, Jobs, run_all, with_state
from tests.support.ranks import LOGGED, SAMPLES, make_trainer, train
from tests.support.spawn import spawn
from tests.support.synthetic import SyntheticData
from tests.support.trainers import SaveAt


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process, after three steps; beside it `step=5.ckpt`, after two more."""
    folder = tmp_path_factory.mktemp("alone")
    callbacks = [ExpertLoad(), SaveAt(3, folder / "three.ckpt")]
    trainer = make_trainer(replace(ALONE, steps=4), 1, folder, *callbacks, log_every_n_steps=LOGGED)
    trainer.fit(ALONE.module(), SyntheticData(micro_batch_size=SAMPLES))
    train(ALONE, 1, folder, SAMPLES, 1, *with_state(folder), checkpoint=folder / "three.ckpt")
    return folder / "three.ckpt"


@pytest.fixture(scope="package")
def found(request: pytest.FixtureRequest, checkpoint: Path, pocket_pile: Path) -> Found:
    modules = [getattr(item, "module", None) for item in request.session.items]
    modules = [module for module in dict.fromkeys(modules) if hasattr(module, "JOBS")]
    chosen: Jobs = {}
    for module in modules:
        for ranks, here in module.JOBS.items():
            known = chosen.setdefault(ranks, [])
            known += [job for job in here if job not in known]
    results: Found = {}
    for ranks, jobs in sorted(chosen.items()):
        folder = checkpoint.parent / str(ranks)
        if ranks == 1:
            by_rank = [run_all(jobs, 1, checkpoint.parent, checkpoint)]
        else:
            by_rank = spawn(ranks, run_all, jobs, ranks, folder, checkpoint, folder=folder)
        for index, (job, cell) in enumerate(jobs):
            assert (job, cell.name) not in results, f"two cells of {job.__name__} are named {cell.name}"
            results[job, cell.name] = [returned[index] for returned in by_rank]
    return results
