"""A checkpoint's folder on disk: written whole or not at all, by one process or by many; read entry by entry.

    name.ckpt/
      checkpoint.json                                 what the folder holds, and everything that is not a tensor
      model.safetensors                               or one file a rank: model-00000-of-00004.safetensors, ...
      optimizer.safetensors                           likewise
      state.safetensors                               tensors that checkpoint.json refers to; absent if there are none

Which file holds an entry means nothing: a reader sees the union.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class TensorFiles:
    """The entries of one kind (`model`, `optimizer`, `state`) in a folder, read when asked for.

    Args:
        folder: the checkpoint.
        kind: first part of the files' names.
        required: whether it is an error to find no file.

    Raises:
        ValueError: a file is missing or cannot be read, or two files hold the same entry.
    """

    def __init__(self, folder: str | Path, kind: str, required: bool = True) -> None:
        self._folder, self._kind = Path(folder), kind
        self._file_of: dict[str, Path] = {}
        files = sorted(self._folder.glob(f"{kind}*.safetensors"))
        if required and not files:
            raise ValueError(f"{folder} has no {kind}.safetensors; use another checkpoint")
        for file in files:
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                    if name in self._file_of:
                        raise ValueError(
                            f"{file} holds {name}, and so does {self._file_of[name]}; use another checkpoint"
                        )
                    self._file_of[name] = file

    @property
    def names(self) -> set[str]:
        """All entries."""
        return set(self._file_of)

    def read(self, name: str) -> Tensor:
        """One entry, on the CPU.

        Raises:
            ValueError: there is none.
        """
        if name not in self._file_of:
            raise ValueError(f"the checkpoint {self._folder} lacks {name} ({self._kind}); use another checkpoint")
        with _opened(self._file_of[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def read_all(self) -> dict[str, Tensor]:
        """Every entry."""
        found: dict[str, Tensor] = {}
        for file in sorted(set(self._file_of.values())):
            with _opened(file) as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return found


def begin(path: Path) -> Path:
    """An empty folder beside `path` to write into."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def write_tensors(folder: Path, kind: str, entries: dict[str, Tensor], rank: int = 0, ranks: int = 1) -> None:
    """Write one file of entries and flush it to disk."""
    part = f"-{rank:05}-of-{ranks:05}" if ranks > 1 else ""
    file = folder / f"{kind}{part}.safetensors"
    save_file({name: value.contiguous() for name, value in entries.items()}, file)
    _flush(file)


def finish(temporary: Path, path: Path, document: dict[str, Any]) -> None:
    """Write `checkpoint.json`, then give the folder its name, in place of what has it."""
    (temporary / "checkpoint.json").write_text(json.dumps(document, indent=1))
    for file in (temporary / "checkpoint.json", temporary):
        _flush(file)
    replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        path.rename(replaced)
    temporary.rename(path)
    _flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def abandon(temporary: Path) -> None:
    """Delete what was not finished; nothing if it was."""
    shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a checkpoint, or the link to one."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        doomed = path.with_name(f".{path.name}.removed-{os.getpid()}")
        path.rename(doomed)  # in one step: a folder with the final name is whole, also while one is deleted
        shutil.rmtree(doomed)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises its own type, which says neither the file nor what to do
        raise ValueError(f"{file} cannot be read ({error}); use another checkpoint") from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
