"""Write a checkpoint folder atomically, from one process or many; delete one.

A folder is named `.name.ckpt.writing` while it is written, `.name.ckpt.replaced` while a newer one takes its name, and
`.name.ckpt.removed` while it is deleted. A folder under its final name is complete. The folder that a killed process leaves is
deleted when the name is used again, and at the next start of a run.
"""

import json
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

from nlgmoe.checkpoint.reading import FileRecord, checksum_of_json
from nlgmoe.data.model_files import TokenizerFiles
from nlgmoe.files import flush, xxh3_of
from nlgmoe.validation import RunError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder for `finish`; delete it at the end of the block unless it was finished."""
    temporary = begin(path)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def begin(path: Path) -> Path:
    """Create an empty temporary folder beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def write_tensors(
    folder: Path, kind: str, entries: dict[str, Tensor], rank: int = 0, ranks: int = 1
) -> dict[str, FileRecord]:
    """Write file `rank` of `ranks` with one entry or more, flush it to disk, and return its record for `finish`."""
    shard = f"-{rank:05}-of-{ranks:05}" if ranks > 1 else ""
    file = folder / f"{kind}{shard}.safetensors"
    entries = {name: value.detach().cpu().contiguous() for name, value in entries.items()}
    if kind == "model" and (bad := [name for name, value in entries.items() if not value.isfinite().all()]):
        raise RunError(f"the weight {bad[0]} is NaN or infinite; the checkpoint is not written")
    save_file(entries, file)
    file.chmod(folder.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
    flush(file)
    tensors = {name: (str(value.dtype).removeprefix("torch."), list(value.shape)) for name, value in entries.items()}
    return {file.name: {"checksum": xxh3_of(file), "tensors": tensors}}


def finish(
    temporary: Path,
    path: Path,
    document: dict[str, Any],
    files: dict[str, FileRecord],
    tokenizer: TokenizerFiles | None = None,
) -> None:
    """Write `checkpoint.json`, the tokenizer and `manifest.json`, then rename the folder to `path`, replacing an older one.

    `files` is the union of the results of `write_tensors`; the tokenizer has the model's files beside it.
    """
    texts = {"checkpoint.json": json.dumps(document, indent=1).encode()}
    texts |= {name: text.encode() for name, text in (tokenizer or {}).items()}
    files = files | {name: {"checksum": xxhash.xxh3_64_hexdigest(text)} for name, text in texts.items()}
    manifest = {"checksum": checksum_of_json(files), "files": files}
    texts["manifest.json"] = json.dumps(manifest, separators=(",", ":")).encode()
    for name, text in texts.items():
        (temporary / name).write_bytes(text)
        flush(temporary / name)
    flush(temporary)
    replaced = path.with_name(f".{path.name}.replaced")
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    temporary.rename(path)
    flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Raise a ValueError with the reason and the remedy in place of an error of the file system."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = f"the checkpoint {path} cannot be written ({write_error_reason(error)})"
        remedy = "make room, or fix the reason given, and start again (a run with --ckpt_path last)"
        raise RunError(f"{problem}; earlier checkpoints are unchanged: {remedy}") from error


def write_error_reason(error: Exception) -> str:
    """Return the operating system's message for an error, or safetensors', which contains it."""
    return getattr(error, "strerror", None) or str(error)


def remove(path: Path) -> None:
    """Delete a checkpoint, or a link to one."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        renamed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)  # so that no incomplete folder ever has the final name
        shutil.rmtree(renamed, ignore_errors=True)
        if renamed.exists():  # NFS keeps files that are open
            rank_zero_warn(f"{renamed} cannot be deleted as a whole; the next start of the run tries it again")
