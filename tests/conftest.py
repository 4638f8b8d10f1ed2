"""Settings that every test runs under."""

import os
import signal
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from nlgmoe.data.pocket.build import prepare

# A shell that starts the suite in the background lets it ignore Ctrl+C, and so the processes that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tensors here are tiny: more threads only wait for each other, and the suite runs one process per core.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Programs that pip has brought, such as ninja, are found without activating the environment.
os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"

# No deadlines: the machine decides how long an example takes, not the code. Derandomised: CI repeats itself.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def pocket_pile() -> Path:
    """The real corpus, in the folder that the quickstart uses too, tokenised with `pocket-4k`; built if it is missing."""
    folder = Path(__file__).parents[1] / "data" / "pocket_pile"
    prepare(folder, "pocket-4k")
    return folder


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """A test that waits for another process, as one that opens a FIFO does, fails."""

    def fail(*_: object) -> None:
        pytest.fail("waited for 20 seconds")  # no `OSError`, which is caught

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
