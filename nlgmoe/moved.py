"""Names of older versions. Class paths in YAML files and in the `config.yaml` of earlier runs still resolve, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from typing_extensions import override

# Old name -> new name. An entry stays for one minor version (CONTRIBUTING.md, "Versions"); these are from 0.3.
NAMES = {
    "nlgmoe.Trained": "nlgmoe.LoadedModel",
    "nlgmoe.callbacks.WriteReport": "nlgmoe.WriteReport",
    "nlgmoe.callbacks.ZeroShotEval": "nlgmoe.ZeroShotEval",
    "nlgmoe.load_trained": "nlgmoe.load_pretrained",
}
MODULES = {
    "nlgmoe.cli.main": "nlgmoe.commands.main",
    "nlgmoe.callbacks.write_report": "nlgmoe.tools.report.write_report",
    "nlgmoe.callbacks.zero_shot_eval": "nlgmoe.tools.lm_eval.zero_shot_eval",
    "nlgmoe.loggers": "nlgmoe.monitoring.loggers",
}


def moved_attribute(module: str, name: str) -> Any:
    """Return the new attribute for an old name, with a warning; a module's `__getattr__` calls this.

    Raises:
        AttributeError: `name` is not in `NAMES`.
    """
    old = f"{module}.{name}"
    if old not in NAMES:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new = NAMES[old]
    _warn(old, new)
    home, _, attribute = new.rpartition(".")
    return getattr(importlib.import_module(home), attribute)


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name works until the next minor version", FutureWarning, stacklevel=4)


class MovedModules(MetaPathFinder, Loader):
    """Finds modules by their old names: empty modules that forward attributes to the new ones."""

    @override
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return a spec for a name in `MODULES`."""
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    @override
    def exec_module(self, module: ModuleType) -> None:
        """Warn, and forward attributes."""
        old, new = module.__name__, MODULES[module.__name__]
        _warn(old, new)
        module.__getattr__ = lambda name: getattr(importlib.import_module(new), name)  # type: ignore[method-assign]


def install() -> None:
    """Look modules up in `MODULES` before other finders."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
