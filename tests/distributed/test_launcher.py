"""A rank whose launcher has ended does not wait for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = """
import os, sys, time
from nlgmoe.parallel.launcher import end_with_launcher, outlive_launcher
how, pipe = sys.argv[1:]
end_with_launcher()
if how == "connected":
    outlive_launcher()
print("goes on", flush=True)
time.sleep(3)
os.write(int(pipe), b"outlived")
"""
LAUNCHER = """
import os, subprocess, sys
from nlgmoe.parallel.launcher import named_launcher
rank, how, pipe, local_rank = sys.argv[1:]
with named_launcher():
    command, environment = [sys.executable, "-c", rank, how, pipe], os.environ | {"LOCAL_RANK": local_rank}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, pass_fds=[int(pipe)])
    assert started.stdout.readline() == b"goes on\\n"
os.kill(os.getpid(), 15)
"""


@pytest.mark.parametrize(
    ("how", "local_rank", "outlives"), [("waits", "1", False), ("connected", "1", True), ("waits", "0", True)]
)
def test_a_rank_ends_with_its_launcher_until_it_is_connected(how: str, local_rank: str, outlives: bool) -> None:
    read, write = os.pipe()
    command = [sys.executable, "-c", LAUNCHER, RANK, how, str(write), local_rank]
    assert subprocess.run(command, cwd=ROOT, pass_fds=[write], timeout=60, check=False).returncode == -15
    os.close(write)
    with os.fdopen(read, "rb") as pipe:  # at its end when the rank has ended
        assert pipe.read() == (b"outlived" if outlives else b"")


def test_a_signal_that_others_have_set_stays() -> None:
    """As PyTorch does for the ranks of `ddp_spawn`."""
    program = """
import ctypes, signal
from nlgmoe.parallel.launcher import outlive_launcher
libc, found = ctypes.CDLL(None), ctypes.c_int()
libc.prctl(1, signal.SIGINT)
outlive_launcher()
libc.prctl(2, ctypes.byref(found))
print(found.value)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"


def test_a_rank_whose_launcher_has_ended_ends_at_once() -> None:
    environment = os.environ | {"NLGMOE_LAUNCHER": "4194305", "LOCAL_RANK": "1"}
    command = [sys.executable, "-c", RANK, "waits", "0"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
