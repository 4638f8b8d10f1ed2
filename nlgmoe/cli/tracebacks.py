"""What the traceback of an exception says of its place: a user's code, a module that is imported, a logger, a checkpoint."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

# Folders of code that is not a user's
_PACKAGES = (str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
_RESTORING = "lightning.pytorch.trainer.connectors.checkpoint_connector"
_LOGGERS = "lightning.pytorch.loggers.logger"


def raised_in(error: BaseException) -> str:
    """Name of the module whose code raised the exception; empty if it was never raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))


def is_complaint(error: BaseException) -> bool:
    """Return whether an exception is a message to the user, from this project or from Lightning's checks."""
    if isinstance(error, OSError) or type(error).__name__ == "MisconfigurationException":
        return True
    package = raised_in(error).split(".")[0]
    expected = {
        "nlgmoe": ValueError | ImportError,
        "lightning": ValueError | ImportError | RuntimeError,
        "fsspec": ImportError,
    }
    return isinstance(error, expected.get(package, ()))


def in_users_code(error: BaseException) -> str | None:
    """Return the innermost line of a user's own code in the traceback, such as of a callback; None: there is none."""
    frames = [
        (frame.f_code.co_filename, line, frame.f_globals) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    for file, line, names in reversed(frames):
        if names.get("__name__") != "__main__" and os.path.exists(file) and not _is_of_package(Path(file)):
            return f"{os.path.relpath(file) if Path(file).is_relative_to(Path.cwd()) else file}, line {line}"
    return None


def _is_of_package(file: Path) -> bool:
    """Return whether a file is of nlgmoe, Python or an installed package, or was made by `torch.compile`."""
    made = any(part in ("site-packages", "dist-packages") or part.startswith("torchinductor_") for part in file.parts)
    return made or any(file.is_relative_to(folder) for folder in _PACKAGES)


def imported_in(error: BaseException) -> str | None:
    """Return the name of the module that was being imported when the exception was raised; None: there was none."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    name = str(frames[-1].f_globals.get("__name__")) if frames else "__main__"
    return None if name == "__main__" else name


def failed_logger(error: BaseException) -> tuple[str, bool] | None:
    """Return the class of the logger, of another package, in which the exception was raised, and whether it was being made."""
    if raised_in(error).split(".")[0] in ("nlgmoe", "lightning") and not isinstance(error, TypeError):
        return None
    being_made, name = False, None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        kind = type(frame.f_locals.get("self"))
        if any(base.__module__ == _LOGGERS for base in kind.__mro__) and not kind.__module__.startswith("nlgmoe."):
            name, being_made = kind.__name__, being_made or frame.f_code.co_name in ("__init__", "experiment")
    return None if name is None else (name, being_made)


def being_restored(error: BaseException) -> str | None:
    """Return the checkpoint that Lightning was restoring when the exception was raised; None if it was not."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == _RESTORING and "dump" not in frame.f_code.co_name:
            return str(frame.f_locals["self"].trainer.ckpt_path)
    return None
