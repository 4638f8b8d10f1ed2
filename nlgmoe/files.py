"""Files: atomic writing and checksums."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` at the end of the block.

    An older `path` stays until then, and stays if the block raises.
    """
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, indent: int = 1, durable: bool = False) -> None:
    """Write a value as JSON, atomically; `durable`: it is on the disk before it has its name."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
        if durable:
            flush(temporary)


def flush(path: Path) -> None:
    """Write a file's or folder's cached data to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def xxh3_of(path: Path) -> str:
    """Return the hexadecimal 64-bit XXH3 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def expand_home(text: str) -> str:
    """Replace `~/` at the beginning by the home folder, which a shell does not do in `--name=~/...`."""
    return os.path.expanduser(text) if text.startswith("~/") else text


def yaml_beside(checkpoint: Path) -> Path:
    """Return `NAME.yaml` of `NAME.ckpt`: settings with which `train.py` validates the checkpoint or trains from its weights."""
    return checkpoint.with_suffix(".yaml")
