"""Freed memory is kept on CPUs, segments grow on accelerators, and threads spin briefly, where nobody has said otherwise."""

import os
import subprocess
import sys

import pytest
import torch

from nlgmoe.device import configure_allocator
from tests.processes import python

# Faults of a page while 64 MB are asked for and given back eight times, the first time apart.
COUNT = """
import resource, torch
from nlgmoe.device import configure_allocator, keep_freed_memory
{call}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16_000_000)
before = faults()
for _ in range(7):
    torch.ones(16_000_000)
print(faults() - before)
"""


def faults(call: str, **environment: str) -> int:
    code = COUNT.format(call=call)
    return int(python("-c", code, env=environment).stdout)


def test_memory_is_not_asked_for_again() -> None:
    assert faults("configure_allocator(torch.device('cpu'))") < 1000
    assert faults("assert not keep_freed_memory()", MALLOC_ARENA_MAX="2") > 50_000  # the environment's own settings win


def test_segments_grow_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "PYTORCH_ALLOC_CONF"
    for given, then in (({}, {name: "expandable_segments:True"}), ({name: "7"}, {name: "7"})):
        monkeypatch.setattr(os, "environ", {"MALLOC_ARENA_MAX": "2"} | given)  # keeps this process's memory as it is
        configure_allocator(torch.device("cuda"))
        assert os.environ == {"MALLOC_ARENA_MAX": "2"} | then


@pytest.mark.parametrize(
    ("given", "then"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_spin_briefly_unless_the_environment_says_otherwise(given: dict[str, str], then: str) -> None:
    code = "import nlgmoe, os, sys; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == then
