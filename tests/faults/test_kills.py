"""A run on two ranks that is killed again and again ends as the undisturbed one does; `test_every_call.py` is of one process."""

from pathlib import Path

from tests.faults.harness import TIMEOUT_SECONDS, Run
from tests.faults.train_with_fault import Fault

KILLS = [
    Fault(5),  # while the first checkpoint is written
    Fault(30),
    Fault(4, rank=1, action="kill rank"),
    Fault(35),
    Fault(12, action="kill rank"),
]


def test_a_run_killed_five_times_is_the_undisturbed_one(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", undisturbed.data)
    left = set()
    for fault in KILLS:
        had = run.newest()
        ended = run.start(fault)
        assert ended.code == -9 if fault.rank == 0 else ended.code not in (0, -9), f"{fault}: {ended.output}"
        assert had == 0 or f"step-{had}.ckpt" in ended.output, ended.output  # which it resumes
        assert run.newest() >= had  # reads every checkpoint: none is damaged
        if fault.action == "kill rank":
            assert ended.seconds_after <= TIMEOUT_SECONDS + 5  # the other rank ends
        left |= run.leftovers()
    assert left, "no kill hit a checkpoint that was being written"
    run.finish_as(undisturbed)
