"""A file that cannot grow ends a run in good order; `make test-faults` fills a real file system (`campaign_disk_full.py`)."""

from pathlib import Path

from tests.faults.disk_full import check_goes_on, check_refused_write
from tests.faults.fault import Fault
from tests.faults.harness import Run


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", undisturbed.data)
    ended = run.start(Fault("writing", count=16, action="fill", limit=100_000))  # at the third save or the fourth
    check_refused_write(run, ended, reason="File too large")
    check_goes_on(run, undisturbed)
