"""Training across two hosts, between which the network falls silent.

A host is a network namespace of this machine; a switch that can be turned off joins them.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import ENVIRONMENT, Ended, Launched, Run
from tests.support.processes import ROOT

PORT = 29511  # the namespaces have all ports to themselves
TIMEOUT = 40.0  # seconds that a rank waits for another one; below that hosts may start apart
GRACE = 30.0  # for torchrun to notice that its rank has ended, on a busy machine
_PATH = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


class Cluster:
    """Two hosts, each a namespace with an address, and the switch between them. Files are shared."""

    def __init__(self) -> None:
        self.switch, *self.hosts = (f"{name}-{os.getpid()}" for name in ("switch", "host0", "host1"))

    def build(self) -> None:
        """Raises `OSError` or `CalledProcessError` where this machine has no namespaces, or no `ip`."""
        for name in (self.switch, *self.hosts):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        for number, host in enumerate(self.hosts):
            port = f"port{number}"
            ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", host, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
        self.turn("up")

    def remove(self) -> None:
        """End all that runs on the hosts, and remove them."""
        for name in (self.switch, *self.hosts):
            for number in processes_on(name):
                os.kill(number, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], env=os.environ | _PATH, capture_output=True)

    def start(self, run: Run) -> list[Launched]:
        """Start one rank of two on each host, as on a cluster: torchrun, the first one's address given to both."""
        launched = []
        for number, host in enumerate(self.hosts):
            words = ["ip", "netns", "exec", host, "env", "GLOO_SOCKET_IFNAME=eth0", f"PATH={_PATH['PATH']}"]
            words += [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
            words += [f"--node_rank={number}", "--master_addr=10.77.0.1", f"--master_port={PORT}"]
            words += [str(ROOT / "train.py"), *run.arguments(), "--trainer.devices=1", "--trainer.num_nodes=2"]
            output = run.next_output()
            with output.open("w") as file:
                process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT | _PATH, stdout=file, stderr=file)
            # torchrun gives its ranks process groups of their own.
            launched.append(Launched(process, output, lambda host=host: processes_on(host)))  # type: ignore[misc]
        return launched

    def turn(self, state: str) -> None:
        """Turn the switch `up` or `down`: packets vanish, while the hosts' own links stay up and no connection is closed."""
        ip("-n", self.switch, "link", "set", "bridge", state)


def wait(launched: list[Launched], timeout: float = 300) -> list[Ended]:
    try:
        return [each.wait(timeout) for each in launched]
    finally:
        for each in launched:
            each.kill()


def wait_for_step(run: Run, step: int, timeout: float = 120) -> None:
    """Wait until the run has trained that many steps."""
    rows = run.folder / "metrics.csv"
    until = time.monotonic() + timeout
    while not rows.exists() or rows.read_text().count("\n") <= step:
        assert time.monotonic() < until, f"{run.folder} does not train"
        time.sleep(0.1)


def processes_on(host: str) -> list[int]:
    """Numbers of everything that runs on a host; none if there is no such host."""
    found = subprocess.run(["ip", "netns", "pids", host], env=os.environ | _PATH, capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], env=os.environ | _PATH, capture_output=True, check=True)


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
