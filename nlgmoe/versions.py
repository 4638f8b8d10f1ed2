"""Versions of what a run was made with, for checkpoints and run folders."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "nlgmoe",
    "torch",
    "lightning",
    "deepspeed",
    "torchmetrics",
    "datasets",
    "transformers",
    "tokenizers",
    "jsonargparse",
)


def versions() -> dict[str, str]:
    """Installed version by package, and Python's; looked up without importing anything."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
