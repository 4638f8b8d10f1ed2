"""Load files of `torch.save` without running code from them.

PyTorch's restricted unpickler makes tensors and plain containers. A training script's own objects (an enumeration, the state of
NumPy's generator) become empty placeholders: their packages are neither needed nor imported. Objects of other packages are
refused.
"""

from __future__ import annotations

import pickle
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from nlgmoe.validation import RunError

# Packages whose objects a Megatron-DeepSpeed script leaves in a checkpoint.
_PACKAGES = ("apex", "collections", "datetime", "deepspeed", "enum", "megatron", "numpy", "pathlib", "torch", "types")
_NAMES = ("builtins.getattr", "signal.Signals")  # Python 3.11 pickles a member of an enumeration with the first
_NAMESPACE = "argparse.Namespace"


class Placeholder:
    """An object of the file, without its content."""

    def __new__(cls, *_: Any) -> Placeholder:
        """Accept and ignore any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load(file: Path) -> Any:
    """Load a file to the CPU, and compare its checksums; tensors are memory-mapped."""
    if not zipfile.is_zipfile(file):
        raise RunError(
            f"{file} cannot be read (no file of torch.save, or cut off, or of PyTorch before 1.6); copy the checkpoint anew, or "
            "load and save it with a newer PyTorch where it was trained"
        )
    try:
        with zipfile.ZipFile(file) as archive:  # `torch.load` compares no checksums
            if (damaged := archive.testzip()) is not None:
                raise RunError(f"the checksum of {damaged} in it is wrong")
        names = set(get_unsafe_globals_in_checkpoint(file)) - {_NAMESPACE}
        foreign = sorted(name for name in names - {*_NAMES} if name.partition(".")[0] not in _PACKAGES)
        if not foreign:
            placeholders: list[Any] = [(type(name, (Placeholder,), {}), name) for name in names]
            with safe_globals([Namespace, *placeholders]):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunError(f"{file} cannot be read ({reason or type(error).__name__}); copy the checkpoint anew") from error
    raise RunError(
        f"{file} holds {foreign[0]}, which no Megatron-DeepSpeed checkpoint needs and which could run code; nothing was read: "
        "get the checkpoint from where it was trained"
    )
