"""Three kills of one run, in each stage of a checkpoint's life; `make test-faults` has thirty (`campaign_kills.py`)."""

from pathlib import Path

from tests.faults.harness import Run
from tests.faults.kills import campaign


def test_a_run_killed_three_times_ends_as_if_nothing_had_happened(undisturbed: Run, tmp_path: Path) -> None:
    kills, (finished,) = campaign(tmp_path, undisturbed, kills=3)
    assert len(kills) == 3
    assert any(kill.leftovers for kill in kills)
    assert finished.largest_difference == 0
