"""Read a checkpoint folder and check every byte of it.

    name.ckpt/
      checkpoint.json                                 everything but tensors
      model.safetensors                               or one file per rank: model-00000-of-00004.safetensors, ...
      optimizer.safetensors                           likewise; absent if only weights were saved
      state.safetensors                               tensors that checkpoint.json refers to; absent if there are none
      tokenizer.json                                  the run's tokenizer, in the format of the `tokenizers` library, and
                                                      the model's files beside it (`data/model_files.py`)
      manifest.json                                   type, shape and checksum of every tensor, by file

A reader takes the union of the files; it does not matter which file holds an entry. Checksums are 64-bit xxHash (XXH3), which
detects damage, not tampering. `writing.py` writes the folder.
"""

import functools
import json
import math
import re
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nlgmoe.config import GPTConfig
from nlgmoe.data.model_files import BESIDE, TOKENIZER, TokenizerFiles
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.files import yaml_beside
from nlgmoe.parts import ForeignCodeError
from nlgmoe.validation import RunError, SettingError

FORMAT = "nlgmoe-portable"
VERSION = 3
REMEDY = "use another checkpoint"
KINDS = ("model", "optimizer", "state")  # prefix of the tensor files' names
Contents = dict[str, list[Any]]  # entry -> [type, shape, checksum]


def read_document(path: str | Path) -> dict[str, Any]:
    """Read the `checkpoint.json` of a folder."""
    file = Path(path) / "checkpoint.json"
    if Path(path).is_file():
        reason = "Lightning's .ckpt files are not read, because they hold pickled objects"
        raise SettingError(f"{path} is a file, not a checkpoint folder with checkpoint.json in it; {reason}")
    if not file.exists():
        problem = "expected a folder with checkpoint.json in it" if Path(path).exists() else "it does not exist"
        raise SettingError(f"no checkpoint at {path}: {problem}")
    document = read_json(file)
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        saved_format = f"{document.get('format')} version {document.get('version')}"
        raise RunError(f"{path} is {saved_format}; this nlgmoe reads {FORMAT} version {VERSION}")
    _check_bytes(file, read_manifest(path)["checkpoint.json"])
    try:
        GPTConfig.from_dict(document["model_config"])
    except ForeignCodeError:
        pass  # raised again, with the remedy, where the model is built
    except (AttributeError, TypeError, ValueError) as error:
        writer = f"nlgmoe {document['versions'].get('nlgmoe')}"
        raise RunError(f"{file}, written by {writer}, describes no model: {error}; {REMEDY}") from error
    return document


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the `manifest.json` of a folder: `files`, file -> `Contents`, and the checksums of the other JSON files."""
    file = Path(path) / "manifest.json"
    if not file.exists():
        raise RunError(f"{path} has no manifest.json; {REMEDY}")
    manifest = read_json(file)
    if manifest.get("checksum") != checksum_of_manifest(manifest):
        raise RunError(f"{file} is damaged (its checksum differs); {REMEDY}")
    return manifest


def read_tokenizer(path: str | Path) -> TokenizerFiles | None:
    """Read the tokenizer of a folder, and the model's files beside it; None if the checkpoint was saved without one."""
    manifest = read_manifest(path)
    if TOKENIZER not in manifest:
        return None
    names = [name for name in (TOKENIZER, *BESIDE) if name in manifest]
    return {name: _check_bytes(Path(path) / name, manifest[name]).decode() for name in names}


def tokenizer_matches(tokenizer: TokenizerFiles, path: str | Path) -> bool:
    """Return True if `tokenizer` has the same ids as the checkpoint's, or the checkpoint has none."""
    stored = read_tokenizer(path)
    if stored is None or stored == tokenizer:
        return True
    return Tokenizer.from_files(tokenizer, "of the run").has_same_ids(Tokenizer.from_files(stored, "of the checkpoint"))


def _check_bytes(file: Path, checksum: str) -> bytes:
    if not file.exists():
        raise RunError(f"{file.parent} has no {file.name}; {REMEDY}")
    content = file.read_bytes()
    if xxhash.xxh3_64_hexdigest(content) != checksum:
        raise RunError(f"{file} is damaged (its checksum differs); {REMEDY}")
    return content


class TensorFiles:
    """The entries of one kind in a folder, each read and checked on request.

    Args:
        kind: one of `KINDS`.
        required: raise if there is no file.
        verified: the files' headers need no check here: ranks have verified them together, each a share.
    """

    def __init__(self, folder: str | Path, kind: str, required: bool = True, verified: bool = False) -> None:
        self.folder, self._kind = Path(folder), kind
        # `read` keeps files open, because opening one parses its whole header; a process may have 1,024 open.
        self._open = functools.lru_cache(maxsize=512)(functools.partial(open_tensors, backend="pread"))
        files: dict[str, Contents] = read_manifest(folder)["files"]
        own = {name: contents for name, contents in files.items() if kind_of(name) == kind}
        if not verified:
            headers = (file_problems(self.folder / name, contents, read=False) for name, contents in own.items())
            for problem in chain(*headers):
                raise RunError(f"{problem}; {REMEDY}")
        self._contents: Contents = {}
        self._file_of: dict[str, Path] = {}
        for name, contents in own.items():
            self._contents |= contents
            self._file_of |= dict.fromkeys(contents, self.folder / name)
        if required and not self._contents:
            raise RunError(f"{folder} has no {kind}.safetensors; {REMEDY}")

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every entry."""
        return {name: torch.Size(shape) for name, (_, shape, _) in self._contents.items()}

    def read(self, name: str) -> Tensor:
        """Read one entry to the CPU, into memory of its own."""
        if name not in self._contents:
            raise RunError(f"the checkpoint {self.folder} lacks {name} ({self._kind}); {REMEDY}")
        return self._checked(name, self._open(self._file_of[name]).get_tensor(name))

    def empty(self, name: str, device: torch.device) -> Tensor:
        """Return zeros of an entry's type and shape."""
        dtype, shape, _ = self._contents[name]
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)

    def divide(self, names: Container[str], readers: int) -> list[list[str]]:
        """Divide entries among readers: each gets consecutive ones of the files, about as many values as the others."""
        sizes = {name: math.prod(shape) for name, (_, shape, _) in self._contents.items() if name in names}
        shares: list[list[str]] = [[] for _ in range(readers)]
        before, total = 0, sum(sizes.values())
        for name, size in sizes.items():
            # An entry without values may be the last one, after all values, or the only one.
            shares[min(before * readers // max(total, 1), readers - 1)].append(name)
            before += size
        return shares

    def read_all(self) -> dict[str, Tensor]:
        """Read every entry to the CPU."""
        entries: dict[str, Tensor] = {}
        for file in sorted(set(self._file_of.values())):
            with open_tensors(file) as tensors:
                entries |= {name: self._checked(name, tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118
        return entries

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if problem := entry_problem(self._kind, tensor, self._contents[name]):
            raise RunError(f"{self._file_of[name]}: {name} {problem}; {REMEDY}")
        return tensor


def file_problems(file: Path, contents: Contents, read: bool = True) -> Iterator[str]:
    """Yield each defect of a tensor file, opened once: it is missing or unreadable, entries are missing, unknown or damaged.

    `contents` are its entries in the manifest; without `read`, only their names are compared.
    """
    if not file.exists():
        yield f"{file.parent} has no {file.name}, with {_abbreviate(contents)}"
        return
    try:
        tensors = open_tensors(file)
    except ValueError as error:
        yield str(error)
        return
    with tensors:
        stored = set(tensors.keys())
        for problem, names in {"lacks": contents.keys() - stored, "has unknown": stored - contents.keys()}.items():
            if names:
                yield f"{file} {problem} {_abbreviate(names)}"
        for name in sorted(contents.keys() & stored) if read else ():
            if problem := entry_problem(kind_of(file.name), tensors.get_tensor(name), contents[name]):
                yield f"{file}: {name} {problem}"


def entry_problem(kind: str, tensor: Tensor, recorded: list[Any]) -> str:
    """Describe the defect of an entry, by its record in the manifest; empty if it has none. Only `state` may be not finite."""
    for attribute, actual, expected in zip(("type", "shape", "checksum"), record_of(tensor), recorded, strict=True):
        if actual != expected:
            return f"is damaged (its {attribute} is {actual}, not {expected})"
    if kind != "state" and (bad := int((~tensor.isfinite()).sum())):
        return f"has {bad} of {tensor.numel()} values that are NaN or infinite"
    return ""


def kind_of(file: str) -> str:
    """Return `optimizer` for `optimizer-00001-of-00004.safetensors`."""
    return re.split(r"[-.]", file, maxsplit=1)[0]


def open_tensors(file: Path, backend: str = "mmap") -> Any:
    """Open a safetensors file for reading.

    By `mmap` tensors are views of the file, which counts as memory of the process once it is read; by `pread` each is a copy.
    """
    try:
        return safe_open(file, framework="pt", backend=backend)
    except (SafetensorError, FileNotFoundError) as error:  # safetensors' own, without the file's name
        with suppress(FileNotFoundError):  # also what safetensors says of a file without read permission
            file.open("rb").close()
        raise RunError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from error


def record_of(tensor: Tensor) -> list[Any]:
    """Return a tensor's type, shape and checksum, for the manifest."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    checksum = xxhash.xxh3_64_hexdigest(flat.view(torch.uint8).numpy().data)
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), checksum]


def checksum_of_manifest(manifest: dict[str, Any]) -> str:
    """Compute the checksum of a manifest, over everything but its own `checksum`."""
    contents = {key: value for key, value in manifest.items() if key != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(contents, sort_keys=True).encode())


def hash_of_weights(path: str | Path) -> str:
    """Return a hash of a checkpoint's weights, which depends neither on the number of files nor on their other entries."""
    entries: Contents = {}
    for name, contents in read_manifest(path)["files"].items():
        if kind_of(name) == "model":
            entries |= contents
    return xxhash.xxh3_64_hexdigest(json.dumps(entries, sort_keys=True).encode())


def resolve_link(path: Path) -> Path:
    """Return the checkpoint that a link, such as `last.ckpt`, points to, since a running `fit` may move the link."""
    return path.parent / path.readlink() if path.is_symlink() else path


def holds_run(folder: Path) -> bool:
    """Return True if a run of train.py has started in a folder."""
    return (folder / "config.yaml").exists()


def run_config(path: Path) -> Path | None:
    """Return the `config.yaml` of the run whose folder is `path` or contains it; None if there is none.

    An imported checkpoint `NAME.ckpt` has `NAME.yaml` beside it.
    """
    beside = yaml_beside(path)
    if path.suffix == ".ckpt" and beside.is_file():
        return beside
    return next((folder / "config.yaml" for folder in (path, *path.parents) if holds_run(folder)), None)


def read_json(file: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """Read a JSON file that holds a mapping."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise RunError(f"{file} is damaged (a {type(content).__name__}, not a mapping); {remedy}")
    return content


def _abbreviate(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ordered[0] + (f" and {len(ordered) - 1} more" if len(ordered) > 1 else "")
