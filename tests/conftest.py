"""Settings that every test runs under."""

import gc
import multiprocessing
import os
import signal
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import distributed

from nlgmoe.data import PocketPile

# A shell that starts the suite in the background lets it ignore Ctrl+C, and so the processes that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tensors here are tiny: more threads only wait for each other, and the suite runs one process per core.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Importing torch, Lightning and DeepSpeed takes 8 s of CPU time: processes of tests are forked from one that has.
multiprocessing.set_forkserver_preload(["pytest", "tests.support.jobs", "tests.support.preloaded"])

# Programs that pip has brought, such as ninja, are found without activating the environment.
os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"

# No deadlines: the machine decides how long an example takes, not the code. Derandomised: CI repeats itself.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


# What takes longest is started first, so that no process of the suite is left with one of these files at the end.
SLOW = (
    "distributed/ranks/",
    "test_commands",
    "accelerator/",
    "test_errors",
    "end_to_end/",
    "tools_check/",
    "test_notebooks",
)

# Slow tests of what changes rarely. `make test` leaves them out, `make test-nightly` runs them alone; named on the command line,
# they run.
NIGHTLY = (
    "tests/cli/test_errors.py::test_a_real_command_prints_one_line_and_nothing_else",
    "tests/checkpoint/test_transformers_common.py",
    "tests/cli/test_wheel.py",
    "tests/clients/",
    "tests/distributed/test_commands.py",
    "tests/distributed/test_resume_on_ranks.py::test_resume_on_four_ranks",
    "tests/distributed/test_many_ranks.py",
    "tests/end_to_end/test_memory.py",
    "tests/end_to_end/test_open_moes.py",
    "tests/faults/",
    "tests/layers/test_experts.py::test_compiled_parts_of_experts_compute_the_same",
    "tests/benchmarks/test_real_model.py",
    "tests/test_blocks.py::test_blocks_all_train_with_all_mixtures",
    "tests/benchmarks/test_gpu_command.py",
    "tests/benchmarks/test_gate.py::test_gate_names_a_loss_that_is_not_finite_in_one_line",
    "tests/benchmarks/test_gate.py::test_gate_writes_the_row_of_a_candidate",
    "tests/benchmarks/test_gate.py::test_models_of_a_release_are_those_of_the_runs_in_half_precision",
    "tests/benchmarks/test_reproduce.py::test_campaign_resumes_trunks_and_logits_and_repeats_no_run",
)
IN_BOTH = ("tests/distributed/test_commands.py::test_lightning_launches_ranks_and_torchrun_resumes_what_they_saved",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the slow tests, and no others")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out folders that are nightly as a whole: packages of the extra `clients` are installed for those runs alone."""
    name = f"{collection_path.relative_to(config.rootpath).as_posix()}/"
    in_suite = not config.getoption("--nightly") and config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return True if in_suite and name in NIGHTLY else None


# Files of these folders share what takes long to compute, such as a spawn of ranks: one process of the suite runs them all.
TOGETHER = ("tests/distributed/ranks/",)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divide the tests by file, as `--dist loadfile` does, or by folder."""
    from xdist.scheduler import LoadFileScheduling

    class ByFileOrFolder(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in TOGETHER if nodeid.startswith(folder)), super()._split_scope(nodeid))

    return ByFileOrFolder(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    nightly = config.getoption("--nightly")
    if nightly or config.args_source == pytest.Config.ArgsSource.TESTPATHS:
        slow = [item for item in items if item.nodeid.startswith(NIGHTLY)]
        quick = [item for item in items if not item.nodeid.startswith(NIGHTLY) or item.nodeid.startswith(IN_BOTH)]
        chosen, others = (slow, quick) if nightly else (quick, slow)
        items[:] = chosen
        config.hook.pytest_deselected(items=[item for item in others if item not in set(chosen)])

    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return next((place for place, name in enumerate(SLOW) if name in file), len(SLOW))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: a collection of garbage need not look at it


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A test that trains on one rank in this process leaves no process group, and no launcher's variables, to others."""
    variables = dict(os.environ)
    torch.set_num_threads(1)  # an earlier test may have run a benchmark on all cores: sums then round otherwise
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(variables)


@pytest.fixture(scope="session")
def pocket_pile() -> Path:
    """The real corpus, in the folder that the quickstart uses too, tokenised with `pocket-4k`; built if it is missing."""
    folder = Path(__file__).parents[1] / "data" / "pocket_pile"
    PocketPile().prepare(folder, "pocket-4k")
    return folder
