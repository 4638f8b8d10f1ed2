"""`make gpu DRY_RUN=1`: all tests of tests/gpu and the table of speeds, at tiny shapes on the CPU. The rest needs a GPU."""

import os

from tests.support.processes import python


def test_gpu_command_in_a_dry_run() -> None:
    dry = os.environ | {"NLGMOE_GPU_DRY_RUN": "1"}
    done = python("-m", "pytest", "-o", "addopts=", "--confcutdir=tests/gpu", "-n", "0", "tests/gpu", env=dry)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
    table = python("-m", "benchmarks.gpu", env=dry).stdout
    assert "350M, 16 experts | recomputed | " in table
