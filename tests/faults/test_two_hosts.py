"""Training across two hosts, one of which dies, or falls silent; see `two_hosts.py` for what a host is here."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Run
from tests.faults.two_hosts import Cluster, cluster, reason_without, wait, wait_for_step

TIMEOUT = 40.0  # seconds that a rank waits for another one; below that hosts may start apart
GRACE = 30.0  # for torchrun to notice that its rank has ended, on a busy machine
STEP = 8


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    if reason := reason_without():
        pytest.skip(reason)
    with cluster() as made:
        yield made


@pytest.mark.parametrize("fault", ["a host dies", "the network is silent"])
def test_the_rest_ends_in_time_and_the_run_goes_on(
    fault: str, hosts: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", undisturbed.data, timeout_seconds=TIMEOUT)
    launched = hosts.start(run)
    try:
        wait_for_step(run, STEP)
        began = time.monotonic()
        if fault == "a host dies":
            launched[1].kill()
            ended = [launched[0].wait()]
        else:
            hosts.turn("down")
            ended = [each.wait() for each in launched]
        seconds = time.monotonic() - began
    finally:
        hosts.turn("up")
        wait(launched)
    assert all(each.code != 0 for each in ended), ended[0].output
    assert seconds < TIMEOUT + GRACE
    assert run.newest() > 0
    for each in wait(hosts.start(run)):
        assert each.code == 0, each.output
    run.compare(undisturbed)
