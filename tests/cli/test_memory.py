"""Freed memory is kept on CPUs, and segments grow on accelerators, where nobody has said otherwise."""

import os

import pytest
import torch

from nlgmoe.cli.memory import configure_allocator
from tests.processes import python

# Faults of a page while 64 MB are asked for and given back eight times, the first time apart.
COUNT = """
import resource, torch
from nlgmoe.cli.memory import configure_allocator, keep_freed_memory
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
    assert faults("configure_allocator(torch.device('cuda'))") > 50_000


@pytest.mark.parametrize("environment", [{"MALLOC_ARENA_MAX": "2"}, {"LD_PRELOAD": ""}], ids=str)
def test_the_environments_own_settings_win(environment: dict[str, str]) -> None:
    assert faults("assert not keep_freed_memory()", **environment) > 50_000


@pytest.mark.parametrize(("given", "capacity"), [({}, "20000"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, "7")])
def test_compiled_kernels_are_kept_unless_the_environment_sets_their_number(
    given: dict[str, str], capacity: str
) -> None:
    code = "import os, torch; from nlgmoe.cli.memory import configure_allocator; configure_allocator(torch.device('cpu')); "
    shown = python("-c", code + "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])", env=given).stdout
    assert shown.strip() == capacity


GROWS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("device", "given", "then"),
    [
        ("cpu", {}, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "20000"}),
        ("cuda", {}, GROWS),
        ("cuda", {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_ALLOC_CONF": "a:1"}),
        ("cuda", {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}),
    ],
)
def test_segments_grow_on_accelerators_alone(
    device: str, given: dict[str, str], then: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"MALLOC_ARENA_MAX": "2"} | given)  # keeps this process's memory as it is
    configure_allocator(torch.device(device))
    assert os.environ == {"MALLOC_ARENA_MAX": "2"} | then
