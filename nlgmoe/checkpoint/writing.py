"""Writing a checkpoint's folder: whole or not at all, by one process or by many; deleting it; cleaning up after a kill.

While it is written the folder is called `.name.ckpt.writing-PID`; one that is being replaced `.name.ckpt.replaced-PID`, one
being deleted `.name.ckpt.removed-PID`. A folder with its final name is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nlgmoe.checkpoint.folder import (
    TOKENIZER,
    Contents,
    checksum_of_manifest,
    everything_under,
    is_whole,
    read_document,
    record_of,
)

_LEFTOVER = re.compile(r"\.(?P<name>.+\.ckpt)\.(?P<what>writing|replaced|removed)-(?P<pid>\d+)")


def begin(path: Path) -> Path:
    """An empty folder beside `path` to write into."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def write_tensors(
    folder: Path, kind: str, entries: dict[str, Tensor], rank: int = 0, ranks: int = 1
) -> dict[str, Contents]:
    """Write one file of entries and flush it to disk; what `finish` has to know of it."""
    part = f"-{rank:05}-of-{ranks:05}" if ranks > 1 else ""
    file = folder / f"{kind}{part}.safetensors"
    entries = {name: value.detach().cpu().contiguous() for name, value in entries.items()}
    if kind == "model" and (bad := [name for name, value in entries.items() if not value.isfinite().all()]):
        raise ValueError(f"the weight {bad[0]} is NaN or infinite; the checkpoint is not written")
    save_file(entries, file)
    file.chmod(
        folder.stat().st_mode & 0o666
    )  # safetensors lets nobody else read it; a checkpoint on a cluster is shared
    flush(file)
    return {file.name: {name: record_of(value) for name, value in entries.items()}}


def finish(
    temporary: Path, path: Path, document: dict[str, Any], files: dict[str, Contents], tokenizer: str | None = None
) -> None:
    """Write `checkpoint.json`, `tokenizer.json` and `manifest.json`, then give the folder its name, in place of what has it.

    Args:
        temporary: the folder that `begin` made.
        path: its final name.
        document: for `checkpoint.json`.
        files: what `write_tensors` returned for every file.
        tokenizer: for `tokenizer.json`; None: none is written.
    """
    texts = {"checkpoint.json": json.dumps(document, indent=1).encode()}
    if tokenizer is not None:
        texts[TOKENIZER] = tokenizer.encode()
    manifest: dict[str, Any] = {"files": files}
    manifest |= {name: xxhash.xxh3_64_hexdigest(text) for name, text in texts.items()}
    manifest["checksum"] = checksum_of_manifest(manifest)
    texts["manifest.json"] = json.dumps(manifest, indent=None, separators=(",", ":")).encode()
    for name, text in texts.items():
        (temporary / name).write_bytes(text)
        flush(temporary / name)
    flush(temporary)
    replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        if "optimizer_groups" not in document and _is_needed(path) and "optimizer_groups" in read_document(path):
            rank_zero_warn(
                f"{path} is kept, and not replaced by weights alone: no other checkpoint beside it can be resumed"
            )
            return
        path.rename(replaced)  # killed between this rename and the next: `recover` undoes this one
    temporary.rename(path)
    flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say what could not be written, why, and what to do.

    Raises:
        ValueError: in place of what the file system raised.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the checkpoint {path} cannot be written ({reason(error)}); earlier checkpoints are as they were: make room, "
            "or put right what the reason says, and go on with --ckpt_path last"
        ) from error


def reason(error: Exception) -> str:
    """Why a file could not be written, in the system's words."""
    number = re.search(r"\(os error (\d+)\)", str(error))  # in safetensors' words
    return os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or str(error)


def abandon(temporary: Path) -> None:
    """Delete what was not finished; nothing if it was."""
    shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> bool:
    """Delete a checkpoint, or the link to one; refuse, with False, if no other one in its folder is whole.

    A run that has nothing else to go on from keeps it, whoever asks.
    """
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        if _is_needed(path):
            return False
        doomed = path.with_name(f".{path.name}.removed-{os.getpid()}")
        path.rename(doomed)  # in one step: a folder with the final name is whole, also while one is deleted
        shutil.rmtree(doomed)
    return True


def _is_needed(path: Path) -> bool:
    """Whether `path` is whole, and no other checkpoint of its folder replaces it."""
    others = {other.resolve() for other in path.parent.glob("*.ckpt")} - {path.resolve()}
    return is_whole(path) and not any(_replaces(other, path) for other in sorted(others))


def _replaces(other: Path, path: Path) -> bool:
    """Whether `other` is whole, and training can go on from it if it can from `path`."""
    if not is_whole(other):
        return False
    return "optimizer_groups" in read_document(other) or "optimizer_groups" not in read_document(path)


def recover(run_folder: Path) -> None:
    """Clean up after processes that were killed: half-written and half-deleted folders go, a replaced one comes back.

    What a process that is still there may be busy with is left alone.
    """
    for leftover in sorted(everything_under(run_folder)):
        match = _LEFTOVER.fullmatch(leftover.name)
        if match is None:
            continue
        path = leftover.with_name(match["name"])
        if match["what"] == "replaced" and not path.exists() and not path.is_symlink():
            leftover.rename(path)
        elif not _is_alive(int(match["pid"])):
            shutil.rmtree(leftover, ignore_errors=True)


def flush(path: Path) -> None:
    """What has been written to a file or folder is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_alive(pid: int) -> bool:
    """Whether another process of this machine has this number, and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return pid != os.getpid() and state not in ("Z", "X")
