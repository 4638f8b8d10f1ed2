"""Training across two hosts, between which the network falls silent; see `two_hosts.py` for what a host is here."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Run
from tests.faults.two_hosts import Cluster, wait, wait_for_step

TIMEOUT = 40.0  # seconds that a rank waits for another one; below that hosts may start apart
GRACE = 30.0  # for torchrun to notice that its rank has ended, on a busy machine


@pytest.fixture
def hosts() -> Iterator[Cluster]:
    made = Cluster()
    try:
        made.build()
        yield made
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine has no network namespaces: {error}")
    finally:
        made.remove()


def test_two_hosts_end_in_time_when_the_network_is_silent_and_the_run_goes_on(
    hosts: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", undisturbed.data, timeout_seconds=TIMEOUT)
    launched = hosts.start(run)
    try:
        wait_for_step(run, 8)
        began = time.monotonic()
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
