"""Training across two hosts, one of which dies, or falls silent; see `two_hosts.py` for what a host is here."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fault import Fault
from tests.faults.harness import Ended, Run, differences
from tests.faults.kills import PARITY
from tests.faults.results import Results
from tests.faults.two_hosts import Cluster, cluster, wait, wait_for_step, why_not

PATIENCE = 40.0  # seconds that a rank waits for another one; below that hosts may start apart
GRACE = 30.0  # for torchrun to notice that its rank has ended, on a busy machine
STEP = 8


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with cluster() as made:
        yield made


def _lost_each_other(ended: Ended) -> str:
    assert ended.code != 0, ended.output
    return ended.output.splitlines()[-1]


def _check_equal(run: Run, undisturbed: Run, *resumed_from: int) -> float:
    found = differences(run, undisturbed)
    largest = max(found.values(), default=0.0)
    assert largest <= PARITY[2], found
    return largest


def test_two_hosts_train_as_one_does(hosts: Cluster, undisturbed_ranks: Run, tmp_path: Path, results: Results) -> None:
    run = Run(tmp_path / "run", undisturbed_ranks.data, ranks=2, timeout_seconds=PATIENCE)
    for ended in wait(hosts.start(run)):
        assert ended.code == 0, ended.output
    results.add("two hosts, undisturbed", {"largest_difference": _check_equal(run, undisturbed_ranks)})


def test_a_host_dies_and_the_run_goes_on_on_one_and_then_on_two(
    hosts: Cluster, undisturbed_ranks: Run, tmp_path: Path, results: Results
) -> None:
    run = Run(tmp_path / "run", undisturbed_ranks.data, ranks=2, timeout_seconds=PATIENCE)
    one, two = hosts.start(run)
    try:
        wait_for_step(run, STEP)
        two.kill()
        died = time.monotonic()
        error = _lost_each_other(one.wait())
        seconds = time.monotonic() - died
    finally:
        wait((one, two))
    assert seconds < PATIENCE + GRACE
    first = max(run.checkpoints().values())
    assert 0 < first < 48

    ended = run.start(Fault("writing", count=20))  # on one host, which dies some saves later
    assert ended.code == -9, ended.output
    second = max(run.checkpoints().values())
    assert second > first
    for ended in wait(hosts.start(run)):
        assert ended.code == 0, ended.output
    largest = _check_equal(run, undisturbed_ranks, first, second)
    found = {"seconds": round(seconds, 1), "timeout_seconds": PATIENCE, "error": error, "resumed_from": [first, second]}
    results.add("two hosts, one dies", {**found, "largest_difference": largest})


def test_a_silent_network_ends_both_hosts(
    hosts: Cluster, undisturbed_ranks: Run, tmp_path: Path, results: Results
) -> None:
    run = Run(tmp_path / "run", undisturbed_ranks.data, ranks=2, timeout_seconds=PATIENCE)
    launched = hosts.start(run)
    try:
        wait_for_step(run, STEP)
        hosts.turn("down")
        fell_silent = time.monotonic()
        errors = [_lost_each_other(each.wait()) for each in launched]
        seconds = time.monotonic() - fell_silent
    finally:
        hosts.turn("up")
        wait(launched)
    assert seconds < PATIENCE + GRACE
    newest = max(run.checkpoints().values())
    for ended in wait(hosts.start(run)):
        assert ended.code == 0, ended.output
    largest = _check_equal(run, undisturbed_ranks, newest)
    found = {"seconds": round(seconds, 1), "timeout_seconds": PATIENCE, "errors": errors, "resumed_from": [newest]}
    results.add("two hosts, silent network", {**found, "largest_difference": largest})
