"""What the tests of faults share: undisturbed runs, and the results that the campaign writes down."""

from pathlib import Path

import pytest

from tests.faults.harness import Run
from tests.faults.results import Results, commit


def _undisturbed(folder: Path, data: Path, ranks: int) -> Run:
    run = Run(folder / "undisturbed", data, ranks)
    ended = run.start()
    assert ended.code == 0, ended.output
    return run


@pytest.fixture(scope="session")
def undisturbed(pocket_pile: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on one process that nothing happens to."""
    return _undisturbed(tmp_path_factory.mktemp("one"), pocket_pile, 1)


@pytest.fixture(scope="session")
def undisturbed_ranks(pocket_pile: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One on two ranks, expert-parallel degree 2."""
    return _undisturbed(tmp_path_factory.mktemp("two"), pocket_pile, 2)


@pytest.fixture(scope="session")
def results() -> Results:
    """`docs/results/faults.json` and the tables in `docs/results/faults.md`."""
    return Results(commit())
