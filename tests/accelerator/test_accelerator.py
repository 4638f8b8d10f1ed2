"""Everything that trains, on an accelerator that is none: it fails where a GPU would, and where the host would wait for one.

A process can have one such device and keeps it, so that all of it runs in a process of its own.
"""

import json
from typing import Any

import pytest

from tests.accelerator.cells import CELLS
from tests.accelerator.training import HALF
from tests.support.processes import python
from tests.support.programs import needs

READS = 2  # of the device by the host in an optimizer step, at most
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    needs("c++", "ninja")  # with which it is compiled
    file = tmp_path_factory.mktemp("accelerator") / "found.json"
    done = python("-m", "tests.accelerator.cells", str(file))
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", CELLS)
def test_training_on_the_fake_device_reads_little_and_equals_the_cpu(name: str, found: Found) -> None:
    """That all is on the device, and that model, loss and backward read nothing, `cells.Watched` checks as it runs."""
    cell = found[name]
    assert "error" not in cell, cell["error"]
    half = "16" in name
    for what, expected in cell["expected"].items():
        if what == "reads":
            continue
        near = expected if what == "tokens" else pytest.approx(expected, rel=2e-2 if half else 1e-5)
        assert cell[what] == near, what
    if name not in ("generation", "checkpoints", "steps that are not finite"):  # to find the source, the host may read
        assert cell["reads"] and all(0 < len(reads) <= READS for reads in cell["reads"]), cell["reads"]


@pytest.mark.parametrize("precision", ["32-true", *HALF])
def test_recomputed_block_on_the_fake_device_draws_the_same(precision: str, found: Found) -> None:
    again, once = (found[f"{name} in {precision}"] for name in ("activation checkpointing", "top-1, jitter"))
    assert again["losses"] == once["losses"]
    assert found["dropout"]["losses"] == found["dropout"]["expected"]["losses"] != found["dropout"]["without"]


def test_step_that_is_not_finite_on_the_fake_device_is_named(found: Found) -> None:
    message = found["steps that are not finite"]["message"]
    assert message.startswith("step 1: the gradient norm is nan; first not finite: the gradient of blocks.1.moe.router")
