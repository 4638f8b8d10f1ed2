"""The run that the others are compared with."""

from pathlib import Path

import pytest

from tests.faults.harness import Run


@pytest.fixture(scope="session")
def undisturbed(pocket_pile: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on two ranks without a fault."""
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", pocket_pile)
    ended = run.start()
    assert ended.code == 0, ended.output
    return run
