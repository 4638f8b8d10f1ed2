"""A checkpoint's folder on disk, and reading it: every byte is checked.

    name.ckpt/
      checkpoint.json                                 everything that is not a tensor
      model.safetensors                               or one file a rank: model-00000-of-00004.safetensors, ...
      optimizer.safetensors                           likewise; none if only weights were saved
      state.safetensors                               tensors that checkpoint.json refers to; none if there are none
      tokenizer.json                                  whose ids the model knows, in the `tokenizers` library's format
      manifest.json                                   what is in which file: type, shape and checksum of every tensor

Which file holds an entry means nothing: a reader sees the union. Checksums are xxHash's 64 bits (XXH3), made for damage,
not for malice. `writing.py` is how the folder comes to be.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from nlgmoe.config import unknown_fields
from nlgmoe.files import require_regular

FORMAT = "nlgmoe-portable"
VERSION = 2
OTHER = "use another checkpoint"  # remedy for a folder that is not as it was written
KINDS = ("model", "optimizer", "state")  # first part of the tensor files' names
TOKENIZER = "tokenizer.json"
Contents = dict[str, list[Any]]  # entry -> [type, shape, checksum]


def read_document(path: str | Path) -> dict[str, Any]:
    """The `checkpoint.json` of a folder.

    Raises:
        ValueError: there is no checkpoint at `path`, it is not in this format, or the file is damaged.
    """
    file = Path(path) / "checkpoint.json"
    if Path(path).is_file():
        raise ValueError(
            f"{path} is a file; a checkpoint here is a folder with checkpoint.json in it (Lightning's own .ckpt files hold "
            "pickled objects and are not read)"
        )
    if not file.exists():
        raise ValueError(f"no checkpoint at {path}: expected a folder with checkpoint.json in it")
    document = read_json(file)
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        found = f"{document.get('format')} version {document.get('version')}"
        raise ValueError(f"{path} is {found}; this nlgmoe reads {FORMAT} version {VERSION}")
    if xxhash.xxh3_64_hexdigest(file.read_bytes()) != read_manifest(path)["checkpoint.json"]:
        raise ValueError(f"{file} is damaged (its checksum differs); use another checkpoint")
    config = document.get("model_config")
    if isinstance(config, dict) and (unknown := unknown_fields(config)):
        author = document.get("versions", {}).get("nlgmoe", "unknown")
        raise ValueError(
            f"{path}: model_config.{unknown[0]} is not a setting of this nlgmoe; read it with nlgmoe {author}, which wrote it"
        )
    return document


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The `manifest.json` of a folder: `files`, file -> `Contents`, and the checksum of `checkpoint.json`.

    Raises:
        ValueError: it is missing or damaged.
    """
    file = Path(path) / "manifest.json"
    if not file.exists():
        raise ValueError(f"{path} has no manifest.json; use another checkpoint")
    manifest = read_json(file)
    if manifest.get("checksum") != checksum_of_manifest(manifest):
        raise ValueError(f"{file} is damaged (its checksum differs); use another checkpoint")
    return manifest


def read_tokenizer(path: str | Path) -> str | None:
    """The `tokenizer.json` of a folder; None where the run's data had no tokenizer, or an older version saved it.

    Raises:
        ValueError: it is missing or damaged.
    """
    recorded = read_manifest(path).get(TOKENIZER)
    if recorded is None:
        return None
    file = Path(path) / TOKENIZER
    if not file.exists():
        raise ValueError(f"{path} has no {TOKENIZER}; use another checkpoint")
    require_regular(file, OTHER)
    text = file.read_bytes()
    if xxhash.xxh3_64_hexdigest(text) != recorded:
        raise ValueError(f"{file} is damaged (its checksum differs); use another checkpoint")
    return text.decode()


class TensorFiles:
    """The entries of one kind (`model`, `optimizer`, `state`) in a folder, read when asked for.

    Args:
        folder: the checkpoint.
        kind: first part of the files' names.
        required: whether it is an error to find no file.

    Raises:
        ValueError: a file is missing, or does not hold what the manifest says.
    """

    def __init__(self, folder: str | Path, kind: str, required: bool = True) -> None:
        self._folder, self._kind = Path(folder), kind
        files: dict[str, Contents] = read_manifest(folder)["files"]
        for problem in file_problems(self._folder, files, [kind]):
            raise ValueError(f"{problem}; use another checkpoint")
        self._contents: Contents = {}
        self._file_of: dict[str, Path] = {}
        for name, contents in files.items():
            if kind_of(name) == kind:
                self._contents |= contents
                self._file_of |= dict.fromkeys(contents, self._folder / name)
        if required and not self._contents:
            raise ValueError(f"{folder} has no {kind}.safetensors; use another checkpoint")

    @property
    def names(self) -> set[str]:
        """All entries."""
        return set(self._contents)

    def read(self, name: str) -> Tensor:
        """One entry, on the CPU.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        if name not in self._contents:
            raise ValueError(f"the checkpoint {self._folder} lacks {name} ({self._kind}); use another checkpoint")
        with opened(self._file_of[name]) as tensors:
            return self._checked(name, tensors.get_tensor(name))

    def read_all(self) -> dict[str, Tensor]:
        """Every entry."""
        found: dict[str, Tensor] = {}
        for file in sorted(set(self._file_of.values())):
            with opened(file) as tensors:
                found |= {name: self._checked(name, tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118
        return found

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if problem := entry_problem(self._kind, tensor, self._contents[name]):
            raise ValueError(f"{self._file_of[name]}: {name} {problem}; use another checkpoint")
        return tensor


def file_problems(folder: Path, files: dict[str, Contents], kinds: Iterable[str] = KINDS) -> Iterator[str]:
    """What is missing, unknown, cut off or unreadable, from the files' headers alone; the tensors are not read."""
    for name in sorted({file.name for file in folder.glob("*.safetensors")} - files.keys()):
        yield f"{folder / name} is unknown to manifest.json"
    for name, contents in files.items():
        file = folder / name
        if kind_of(name) not in kinds:
            continue
        if not file.exists():
            yield f"{folder} has no {name}, with {_first_of(contents)}"
            continue
        try:
            with opened(file) as tensors:
                held = set(tensors.keys())
        except ValueError as error:
            yield str(error).removesuffix(f"; {OTHER}")
            continue
        for problem, names in {"lacks": contents.keys() - held, "has unknown": held - contents.keys()}.items():
            if names:
                yield f"{file} {problem} {_first_of(names)}"


def entry_problem(kind: str, tensor: Tensor, recorded: list[Any]) -> str:
    """What is wrong with an entry that was read; empty if nothing is.

    Args:
        kind: one of `KINDS`. Weights and moments have to be finite, state need not be.
        tensor: the entry.
        recorded: of it in the manifest.
    """
    for what, found, expected in zip(("type", "shape", "checksum"), record_of(tensor), recorded, strict=True):
        if found != expected:
            return f"is damaged (its {what} is {found}, not {expected})"
    if kind != "state" and (bad := int((~tensor.isfinite()).sum())):
        return f"has {bad} of {tensor.numel()} values that are NaN or infinite"
    return ""


def kind_of(file: str) -> str:
    """`optimizer` for `optimizer-00001-of-00004.safetensors`."""
    return re.split(r"[-.]", file, maxsplit=1)[0]


def opened(file: Path) -> Any:
    """A tensor file, for reading.

    Raises:
        ValueError: it cannot be read.
    """
    require_regular(file, OTHER)
    try:
        file.open("rb").close()  # of a file that it may not read safetensors says that it is not there
        return safe_open(file, framework="pt")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # safetensors raises its own type, which says neither the file nor what to do
        raise ValueError(f"{file} cannot be read ({error})") from error


def record_of(tensor: Tensor) -> list[Any]:
    """What the manifest says of a tensor."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    checksum = xxhash.xxh3_64_hexdigest(flat.view(torch.uint8).numpy().data)
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), checksum]


def checksum_of_manifest(manifest: dict[str, Any]) -> str:
    """Of everything in it but the checksum itself."""
    contents = {key: value for key, value in manifest.items() if key != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(contents, sort_keys=True).encode())


def is_whole(path: Path) -> bool:
    """Whether nothing is missing or cut off; the tensors are not read."""
    try:
        read_document(path)
        read_tokenizer(path)
        return not any(file_problems(path, read_manifest(path)["files"]))
    except (ValueError, OSError):
        return False


def holds_run(folder: Path) -> bool:
    """Whether a run of train.py has started in a folder."""
    return (folder / "config.yaml").exists()


def is_of_run(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is in a folder, and not in that of another run below it."""
    for follow in (os.path.abspath, os.path.realpath):
        inner, outer = Path(follow(path)), Path(follow(folder))
        between = [one for one in (inner, *inner.parents) if one != outer and one.is_relative_to(outer)]
        if inner.is_relative_to(outer) and not any(map(holds_run, between)):
            return True
    return False


def everything_under(folder: Path) -> Iterator[Path]:
    """Everything under a folder but what is in checkpoints and in folders of other runs; behind links too.

    Raises:
        OSError: a folder cannot be listed.
    """
    seen: set[str] = set()
    waiting = [folder] if folder.is_dir() else []
    while waiting:
        here = waiting.pop()
        if os.path.realpath(here) in seen:
            continue
        seen.add(os.path.realpath(here))
        for path in here.iterdir():
            yield path
            if ".ckpt" not in path.name and path.is_dir() and not holds_run(path):
                waiting.append(path)


def read_json(file: Path, remedy: str = OTHER) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        ValueError: it is damaged; the message ends with `remedy`.
    """
    require_regular(file, remedy)
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged (a {type(found).__name__}, not a mapping); {remedy}")
    return found


def _first_of(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ordered[0] + (f" and {len(ordered) - 1} more" if len(ordered) > 1 else "")
