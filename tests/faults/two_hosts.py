"""Two hosts on one machine: network namespaces, joined by a switch that can be turned off."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.faults.harness import Ended, Launched, Run

PORT = 29511  # the namespaces have all ports to themselves
_PATH = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


@dataclass(frozen=True)
class Host:
    """A host of the cluster: its namespace and address. Files are shared with the others."""

    name: str
    number: int

    @property
    def address(self) -> str:
        """In the cluster's network."""
        return f"10.77.0.{self.number + 1}"

    def start(self, run: Run) -> LaunchedOnHost:
        """One rank of two, as on a cluster: torchrun on each host, the first one's address given to both."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        torchrun += [f"--node_rank={self.number}", "--master_addr=10.77.0.1", f"--master_port={PORT}"]
        launched = run.launch(
            ["--trainer.devices=1", "--trainer.num_nodes=2"],
            launcher=[
                "ip",
                "netns",
                "exec",
                self.name,
                "env",
                "GLOO_SOCKET_IFNAME=eth0",
                f"PATH={_PATH['PATH']}",
                *torchrun,
            ],
        )
        return LaunchedOnHost(launched.process, launched.output, self)

    def processes(self) -> list[int]:
        """Everything that runs on the host."""
        return [int(number) for number in ip("netns", "pids", self.name).split()]


@dataclass(frozen=True)
class LaunchedOnHost(Launched):
    """A command that runs on a host; torchrun gives its ranks process groups of their own."""

    host: Host

    def kill(self) -> None:
        """SIGKILL to all processes of the host."""
        for number in self.host.processes():
            os.kill(number, signal.SIGKILL)
        self.process.wait()

    def runs(self) -> bool:
        """Whether any process of the host is alive."""
        return bool(self.host.processes())


@dataclass(frozen=True)
class Cluster:
    """Two hosts and the switch between them."""

    hosts: tuple[Host, Host]
    switch: str

    def start(self, run: Run) -> tuple[LaunchedOnHost, LaunchedOnHost]:
        """Start the command on both hosts."""
        return self.hosts[0].start(run), self.hosts[1].start(run)

    def turn(self, state: str) -> None:
        """Turn the switch `up` or `down`: packets vanish, while the hosts' own links stay up and no connection is closed."""
        ip("-n", self.switch, "link", "set", "bridge", state)


def wait(launched: tuple[LaunchedOnHost, ...], timeout: float = 300) -> list[Ended]:
    """Until both hosts have ended."""
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


def reason_without() -> str:
    """Return why this machine cannot have namespaces; empty if it can."""
    if shutil.which("ip", path=_PATH["PATH"]) is None:
        return "no `ip` (iproute2) on this machine"
    name = f"try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], env=os.environ | _PATH, capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces: {tried.stderr.strip()}"
    tried = subprocess.run(
        ["ip", "-n", name, "link", "add", "bridge", "type", "bridge"],
        env=os.environ | _PATH,
        capture_output=True,
        text=True,
    )
    ip("netns", "del", name)
    return f"a bridge in a network namespace: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Two hosts, gone at the end with all that runs on them."""
    mark = os.getpid()
    made = Cluster((Host(f"host0-{mark}", 0), Host(f"host1-{mark}", 1)), f"switch-{mark}")
    names = [made.switch, *(host.name for host in made.hosts)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", made.switch, "link", "add", "bridge", "type", "bridge")
        for host in made.hosts:
            port = f"port{host.number}"
            ip("-n", made.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("-n", made.switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
        made.turn("up")
        yield made
    finally:
        for host in made.hosts:
            for number in host.processes():
                os.kill(number, signal.SIGKILL)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], env=os.environ | _PATH, capture_output=True)


def ip(*args: str) -> str:
    """Run `ip`; its output."""
    return subprocess.run(["ip", *args], env=os.environ | _PATH, capture_output=True, text=True, check=True).stdout
