"""Programs that some tests run, and that no installation with pip brings."""

import os
import shutil

import pytest

VARIABLES = {"c++": "CXX", "g++": "CXX", "chromium": "CHROMIUM"}  # that may name another one
ALSO = {"chromium": ("chromium-browser", "google-chrome")}


def find(program: str) -> str | None:
    """Where `program` is on this machine; None: nowhere."""
    if named := os.environ.get(VARIABLES.get(program, "")):
        return shutil.which(named)
    return next(filter(None, map(shutil.which, (program, *ALSO.get(program, ())))), None)


def needs(*programs: str) -> None:
    """Skip the test that calls this, or whose fixture does, where one of them is missing.

    With `CI=true` in the environment the test runs, and fails without it.
    """
    missing = [program for program in programs if find(program) is None]
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"needs {' and '.join(missing)}, which this machine lacks")
