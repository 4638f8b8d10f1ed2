"""Versions of Python and the main packages, for checkpoints and run folders."""

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.11.0"  # pyproject.toml reads it, without importing this file
PACKAGES = ("torch", "lightning", "deepspeed", "torchmetrics", "datasets", "transformers", "tokenizers", "jsonargparse")


def versions() -> dict[str, str]:
    """Return the version of this code, of Python and of each installed package, without importing a package."""
    installed = {"python": platform.python_version(), "nlgmoe": __version__}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed
