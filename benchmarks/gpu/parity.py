"""Step `parity`: `pytest tests/gpu`, with every error that it measures among the figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.run import ROOT, Run


class Figures:
    """A plugin of pytest: hands on what the tests have measured, the worst of the cells of a test."""

    def __init__(self) -> None:
        self.worst: dict[tuple[str, float], float] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of setup, call and teardown, each."""
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)
        test = report.nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
        for name, (value, limit) in report.user_properties if report.when == "teardown" else ():
            key = f"{test}: {name}", limit
            self.worst[key] = max(self.worst.get(key, 0.0), value) if value == value else float("nan")


def parity(run: Run, folder: Path) -> None:
    """Run the tests."""
    figures = Figures()
    os.environ["NLGMOE_GPU_DRY_RUN"] = str(int(run.dry))
    # Not tests/conftest.py, which needs what only the suite does.
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--confcutdir={ROOT / 'tests/gpu'}"]
    pytest.main([*options, f"--basetemp={folder / 'tests'}", str(ROOT / "tests/gpu")], plugins=[figures])
    for (name, limit), value in figures.worst.items():
        run.correct(name, value, at_most=limit)
    run.correct("tests that failed", len(figures.failed))
    run.note("which tests failed", figures.failed)
