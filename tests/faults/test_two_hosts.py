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

from tests.support.commands import ENVIRONMENT, SETTINGS_ON_RANKS, metrics_of, train_py
from tests.support.processes import ROOT

PORT = 29511  # the namespaces have all ports to themselves
TIMEOUT = 40.0  # seconds that a rank waits for another one; below that hosts may start apart
GRACE = 30.0  # for torchrun to notice that its rank has ended, on a busy machine
TOOLS = ENVIRONMENT | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


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
            subprocess.run(["ip", "netns", "del", name], env=TOOLS, capture_output=True)

    def start(self, arguments: list[str], folder: Path) -> list[subprocess.Popen[bytes]]:
        """Start one rank of two on each host, as on a cluster: torchrun, the first one's address given to both."""
        launched = []
        for number, host in enumerate(self.hosts):
            words = ["ip", "netns", "exec", host, "env", "GLOO_SOCKET_IFNAME=eth0", f"PATH={TOOLS['PATH']}"]
            words += [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
            words += [f"--node_rank={number}", "--master_addr=10.77.0.1", f"--master_port={PORT}", "train.py"]
            words += [*arguments, "--trainer.devices=1", "--trainer.num_nodes=2"]
            with (folder / f"{number}.txt").open("w") as file:
                launched.append(subprocess.Popen(words, cwd=ROOT, env=TOOLS, stdout=file, stderr=file))
        return launched

    def codes(self, launched: list[subprocess.Popen[bytes]]) -> list[int]:
        """Wait until nothing runs on the hosts; return how torchrun ended on each."""
        codes = [process.wait(timeout=300) for process in launched]
        until = time.monotonic() + GRACE
        while any(processes_on(host) for host in self.hosts):
            assert time.monotonic() < until, "a rank outlives torchrun"
            time.sleep(0.1)
        return codes

    def turn(self, state: str) -> None:
        """Turn the switch `up` or `down`: packets vanish, while the hosts' own links stay up and no connection is closed."""
        ip("-n", self.switch, "link", "set", "bridge", state)


def processes_on(host: str) -> list[int]:
    """Numbers of everything that runs on a host; none if there is no such host."""
    found = subprocess.run(["ip", "netns", "pids", host], env=TOOLS, capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], env=TOOLS, capture_output=True, check=True)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    try:
        made.build()
        yield made
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine has no network namespaces: {error}")
    finally:
        made.remove()


def test_two_hosts_end_in_time_when_the_network_is_silent_and_the_run_goes_on(
    cluster: Cluster, pocket_pile: Path, tmp_path: Path
) -> None:
    settings = ["fit", *SETTINGS_ON_RANKS, f"--data.data_dir={pocket_pile}", "--trainer.callbacks=[]"]
    settings += ["--model.train_tokens=8192", f"--trainer.strategy.init_args.timeout_seconds={TIMEOUT}"]  # 32 steps
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    disturbed = [*settings, f"--trainer.default_root_dir={run}", "--ckpt_path=auto"]
    launched = cluster.start(disturbed, tmp_path)
    rows, until = run / "metrics.csv", time.monotonic() + 120
    while not rows.exists() or rows.read_text().count("\n") <= 8:
        assert time.monotonic() < until, f"{run} does not train"
        time.sleep(0.1)
    began = time.monotonic()
    cluster.turn("down")
    assert all(code != 0 for code in cluster.codes(launched))
    assert time.monotonic() - began < TIMEOUT + GRACE
    cluster.turn("up")
    assert cluster.codes(cluster.start(disturbed, tmp_path)) == [0, 0], (tmp_path / "0.txt").read_text()
    assert "step-" in (tmp_path / "0.txt").read_text() and not list(run.rglob(".*.ckpt.*"))
    done = train_py(*settings, f"--trainer.default_root_dir={undisturbed}", "--trainer.devices=2")
    assert done.returncode == 0, done.stderr
    for row, expected in zip(metrics_of(run), metrics_of(undisturbed), strict=True):
        assert row == pytest.approx(expected, rel=1e-6, nan_ok=True)
