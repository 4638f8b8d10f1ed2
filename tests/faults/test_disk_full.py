"""A disk that is full for one rank ends the run with one line of each rank; earlier checkpoints stay whole."""

from pathlib import Path

from tests.faults.harness import Run
from tests.faults.train_with_fault import Fault


def test_disk_full_on_one_rank_is_named_by_both(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", undisturbed.data)
    ended = run.start(Fault(5, rank=1, action="fill"))
    assert ended.code == 1 and "Traceback" not in ended.output, ended.output
    assert len(ended.errors) == 2, ended.output
    for error in ended.errors:  # both name the rank whose disk is full
        assert f"rank 1: the checkpoint {run.folder}/checkpoints/step-" in error, error
        assert "File too large" in error and "make room" in error, error
    assert run.newest() > 0 and not run.leftovers()
    run.finish_as(undisturbed)
