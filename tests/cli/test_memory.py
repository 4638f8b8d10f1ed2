"""Freed memory is kept where nobody has said otherwise."""

import subprocess
import sys

import pytest

# Faults of a page while 64 MB are asked for and given back eight times, the first time apart.
COUNT = """
import resource, torch
from nlgmoe.cli.memory import keep_freed_memory
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
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_memory_is_not_asked_for_again() -> None:
    assert faults("assert keep_freed_memory()") < 1000 < 50_000 < faults("")


@pytest.mark.parametrize("environment", [{"MALLOC_ARENA_MAX": "2"}, {"LD_PRELOAD": ""}], ids=str)
def test_the_environments_own_settings_win(environment: dict[str, str]) -> None:
    assert faults("assert not keep_freed_memory()", **environment) > 50_000
