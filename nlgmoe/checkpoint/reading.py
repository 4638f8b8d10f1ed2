"""Read a checkpoint folder.

    name.ckpt/
      checkpoint.json                                 everything but tensors
      model.safetensors                               or one file per rank: model-00000-of-00004.safetensors, ...
      optimizer.safetensors                           or one file per rank; absent if only weights were saved
      state.safetensors                               tensors that checkpoint.json refers to; absent if there are none
      tokenizer.json                                  the run's tokenizer, in the format of the `tokenizers` library, and
                                                      the model's files beside it (`data/model_files.py`)
      manifest.json                                   checksum of every file above; type and shape of its tensors

A reader takes the union of the files; it does not matter which file holds an entry. Checksums are 64-bit xxHash (XXH3), which
detects damage, not tampering. `writing.py` writes the folder.

A JSON file is compared with its checksum when it is read. Tensor files are compared by `nlgmoe verify`, and by
`choose_checkpoint` (`run_checkpoints.py`), with which a run is resumed and a model loaded: all ranks together, each a share of
the files, so that a checkpoint is read once for it, not once per rank. After that, entries are read unchecked: a rank opens the
files that hold its entries, and reads no others of them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Container
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nlgmoe.config import GPTConfig
from nlgmoe.data.model_files import BESIDE, TOKENIZER, TokenizerFiles
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.files import xxh3_of, yaml_beside
from nlgmoe.parts import ForeignCodeError
from nlgmoe.validation import RunError, SettingError

FORMAT = "nlgmoe-portable"
VERSION = 4
REMEDY = "use another checkpoint"
KINDS = ("model", "optimizer", "state")  # prefix of the tensor files' names
Contents = dict[str, tuple[str, list[int]]]  # entry -> its type and shape
FileRecord = dict[str, Any]  # of a file in the manifest: its `checksum`; of a tensor file, `tensors`: its `Contents`


class Checkpoint:
    """A checkpoint folder. Its manifest and its document are read once, on first use.

    Attributes:
        path: the folder; the one that a link, such as `last.ckpt`, points to, since a running `fit` may move the link.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path.parent / path.readlink() if path.is_symlink() else path

    @cached_property
    def document(self) -> dict[str, Any]:
        """Return the contents of `checkpoint.json`."""
        path, file = self.path, self.path / "checkpoint.json"
        if path.is_file():
            reason = "Lightning's .ckpt files are not read, because they hold pickled objects"
            raise SettingError(f"{path} is a file, not a checkpoint folder with checkpoint.json in it; {reason}")
        if not file.exists():
            problem = "expected a folder with checkpoint.json in it" if path.exists() else "it does not exist"
            raise SettingError(f"no checkpoint at {path}: {problem}")
        document = read_json(file)
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            saved_format = f"{document.get('format')} version {document.get('version')}"
            raise RunError(f"{path} is {saved_format}; this nlgmoe reads {FORMAT} version {VERSION}")
        self._require_undamaged(file.name)
        try:
            GPTConfig.from_dict(document["model_config"])
        except ForeignCodeError:
            pass  # raised again, with the remedy, where the model is built
        except (AttributeError, TypeError, ValueError) as error:
            writer = f"nlgmoe {document['versions'].get('nlgmoe')}"
            raise RunError(f"{file}, written by {writer}, describes no model: {error}; {REMEDY}") from error
        return document

    @property
    def config(self) -> GPTConfig:
        """Return the configuration of the model."""
        return GPTConfig.from_dict(self.document["model_config"])

    @cached_property
    def files(self) -> dict[str, FileRecord]:
        """Return the record of every file but the manifest."""
        file = self.path / "manifest.json"
        if not file.exists():
            raise RunError(f"{self.path} has no manifest.json; {REMEDY}")
        manifest = read_json(file)
        if manifest.get("checksum") != checksum_of_json(manifest.get("files")):
            raise RunError(f"{file} is damaged (its checksum differs); {REMEDY}")
        files: dict[str, FileRecord] = manifest["files"]
        return files

    def tensors(self, kind: str, required: bool = True) -> TensorFiles:
        """Return the entries of one of `KINDS`; `required`: raise if there are none."""
        files = {self.path / name: record["tensors"] for name, record in self.files.items() if kind_of(name) == kind}
        if required and not files:
            raise RunError(f"{self.path} has no {kind}.safetensors; {REMEDY}")
        return TensorFiles(self.path, kind, files)

    def tokenizer(self) -> TokenizerFiles | None:
        """Read the tokenizer, and the model's files beside it; None if the checkpoint was saved without one."""
        names = [name for name in (TOKENIZER, *BESIDE) if name in self.files]
        for name in names:
            self._require_undamaged(name)
        return {name: (self.path / name).read_bytes().decode() for name in names} if TOKENIZER in names else None

    def file_names(self, kinds: Collection[str]) -> list[str]:
        """Return the names of the tensor files of these kinds, and of all JSON files."""
        return sorted(name for name, record in self.files.items() if kind_of(name) in kinds or "tensors" not in record)

    def problem_of(self, name: str) -> str:
        """Compare a file with its checksum, and return its defect; empty if it has none."""
        file = self.path / name
        if not file.exists():
            return f"{self.path} has no {name}"
        return "" if xxh3_of(file) == self.files[name]["checksum"] else f"{file} is damaged (its checksum differs)"

    def _require_undamaged(self, name: str) -> None:
        if problem := self.problem_of(name):
            raise RunError(f"{problem}; {REMEDY}")


def tokenizer_matches(tokenizer: TokenizerFiles, stored: TokenizerFiles | None) -> bool:
    """Return True if `tokenizer` has the same ids as the checkpoint's, or the checkpoint has none."""
    if stored is None or stored == tokenizer:
        return True
    return Tokenizer.from_files(tokenizer, "of the run").has_same_ids(Tokenizer.from_files(stored, "of the checkpoint"))


class TensorFiles:
    """The entries of one kind in a folder, each read on request.

    Args:
        kind: one of `KINDS`.
        files: the entries of each file.

    Attributes:
        shapes: shape of every entry.
        dtypes: type of every entry.
    """

    def __init__(self, folder: Path, kind: str, files: dict[Path, Contents]) -> None:
        self.folder, self._kind = folder, kind
        # `read` keeps files open, because opening one parses its whole header; a process may have 1,024 open.
        self._open = functools.lru_cache(maxsize=512)(functools.partial(open_tensors, backend="pread"))
        entries = {name: (file, *entry) for file, contents in files.items() for name, entry in contents.items()}
        self._file_of = {name: file for name, (file, _, _) in entries.items()}
        self.dtypes: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, (_, dtype, _) in entries.items()}
        self.shapes = {name: torch.Size(shape) for name, (_, _, shape) in entries.items()}

    def read(self, name: str) -> Tensor:
        """Read one entry to the CPU, into memory of its own."""
        if name not in self._file_of:
            raise RunError(f"the checkpoint {self.folder} lacks {name} ({self._kind}); {REMEDY}")
        tensor: Tensor = self._open(self._file_of[name]).get_tensor(name)
        return tensor

    def empty(self, name: str, device: torch.device) -> Tensor:
        """Return zeros of an entry's type and shape."""
        return torch.zeros(self.shapes[name], dtype=self.dtypes[name], device=device)

    def divide(self, names: Container[str], readers: int) -> list[list[str]]:
        """Divide entries among readers: each gets consecutive ones of the files, about as many values as the others."""
        sizes = {name: shape.numel() for name, shape in self.shapes.items() if name in names}
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
                entries |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        return entries


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


def checksum_of_json(value: Any) -> str:
    """Return the checksum of a value that JSON can hold, whatever the order of its keys."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())


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
