"""What has to be true of a run whose checkpoint could not be written."""

from __future__ import annotations

from tests.faults.harness import Ended, Run, differences
from tests.faults.kills import PARITY


def check_refused_write(run: Run, ended: Ended, reason: str) -> None:
    """One line a rank names the checkpoint, the reason and the remedy; what was there before is whole, nothing else is there.

    Raises:
        AssertionError: it is not so.
    """
    assert ended.code == 1, ended.output
    assert len(ended.errors) == run.ranks, ended.output
    for error in ended.errors:
        assert str(run.folder) in error and ".ckpt" in error, error
        assert reason in error, error
        assert "make room" in error, f"no remedy: {error}"
        assert "unexpected" not in error, error
    assert "Traceback" not in ended.output
    assert not run.leftovers()


def check_goes_on(run: Run, undisturbed: Run) -> None:
    """With space again, the same command ends as if nothing had happened.

    Raises:
        AssertionError: it does not.
    """
    newest = max(run.checkpoints().values())  # reads all of them
    ended = run.start()
    assert ended.code == 0, ended.output
    assert f"step-{newest}.ckpt" in ended.output
    found = differences(run, undisturbed)
    assert max(found.values(), default=0.0) <= PARITY[run.ranks], found
