"""Conversion of a folder of Hugging Face's format to a checkpoint: an export of `nlgmoe export`, or an open model.

A GGUF file becomes such a folder first (`gguf_file.py`). Tensors are read one by one, so that memory does not grow with the
model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
from torch import Tensor

from nlgmoe.checkpoint.entries import Shapes
from nlgmoe.checkpoint.reading import open_tensors, read_json
from nlgmoe.config import GPTConfig
from nlgmoe.data.model_files import TOKENIZER, TokenizerFiles
from nlgmoe.data.tokenizer_loading import load_tokenizer
from nlgmoe.surgery.write_weights import write_weights
from nlgmoe.tools.hugging_face.configuration_nlgmoe import FIELDS
from nlgmoe.tools.hugging_face.families import FAMILIES, OWN
from nlgmoe.tools.hugging_face.families.family import Family
from nlgmoe.tools.hugging_face.families.tensors import Where, own_layout
from nlgmoe.tools.hugging_face.gguf_file import folder_of_gguf
from nlgmoe.validation import RunError, SettingError

_NEEDED = ["*.json", "model*.safetensors", "merges.txt", "chat_template.jinja"]
_REMEDY = "download or save the model again"


@dataclass(frozen=True)
class Imported:
    """The result of an import."""

    config: GPTConfig  # configuration of the model
    model_type: str  # the family
    no_tokenizer: str  # reason for which the checkpoint has no tokenizer; empty if it has one
    dropped: list[str]  # tensors of the files that the checkpoint does not have


def import_model(source: str, checkpoint: str | Path, overwrite: bool = False) -> Imported:
    """Write the checkpoint atomically, and a YAML file beside it; the arguments are those of `nlgmoe import`.

    Raises:
        ValueError: the source does not exist or is damaged, or its model is not supported.
    """
    origin = f"{source}, by `nlgmoe import`"
    if not source.endswith(".gguf"):
        return _import_folder(_local(source), checkpoint, overwrite, origin)
    with folder_of_gguf(Path(source), Path(checkpoint).absolute().parent) as folder:
        return _import_folder(folder, checkpoint, overwrite, origin)


def _described(folder: Path) -> tuple[GPTConfig, Family | None, dict[str, Any]]:
    """Return the model of `config.json`, its family (None: a folder with our code), and the file's contents."""
    if not (folder / "config.json").is_file():
        raise SettingError(f"{folder} has no config.json; name a folder of Hugging Face's format")
    values = read_json(folder / "config.json", _REMEDY)
    model_type = str(values.get("model_type"))
    if model_type == OWN:
        try:
            return GPTConfig.from_dict({name: values[name] for name in FIELDS if name in values}), None, values
        except (TypeError, ValueError) as error:  # a setting is missing, unknown or out of range
            raise RunError(
                f"{folder}/config.json is damaged or of another nlgmoe ({error}); export the model again"
            ) from error
    if model_type in FAMILIES:
        family = FAMILIES[model_type]
        return family.config(values, folder), family, values
    known = f"{OWN} (what `nlgmoe export` writes), {', '.join(sorted(FAMILIES))}"
    raise SettingError(f"model_type={model_type} of {folder} cannot be imported; supported are {known}")


def _import_folder(folder: Path, checkpoint: str | Path, overwrite: bool, origin: str) -> Imported:
    config, family, values = _described(folder)
    if family is None:
        files, layout = WeightFiles(folder), own_layout(config)
    else:
        files, layout = WeightFiles(folder, family.named), family.layout(config)
    # Blocks that predict further tokens (MTP) follow the model's own.
    first, count = config.num_layers, values.get("num_nextn_predict_layers") or 0
    dropped = files.drop([f"model.layers.{layer}." for layer in range(first, first + count)])
    files.check(layout.shapes, layout.of_entry["token_embedding.weight"][0].tensor)
    tokenizer, missing = _tokenizer(folder, config)
    read = partial(layout.entry, read=files.read)
    document = {} if family is None else {"family": family.name}
    write_weights(checkpoint, read, config, tokenizer, overwrite, origin, document=document)
    return Imported(config, str(values.get("model_type")), missing, dropped)


def _local(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")):
        raise SettingError(f"there is no folder {source}; name a folder, or a model of the Hugging Face hub")
    try:
        description = snapshot_download(source, allow_patterns=["config.json"])
        _described(Path(description))  # refuses a model before its weights are downloaded
        return Path(snapshot_download(source, allow_patterns=_NEEDED))
    except (HFValidationError, HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise (SettingError if isinstance(error, HFValidationError) else RunError)(
            f"{source} is neither a folder nor a model that the Hugging Face hub provides ({error}); name another source"
        ) from error


class WeightFiles:
    """The tensors of a folder, in `model.safetensors` or `model-00001-of-00004.safetensors`, ...

    `named` returns the name of a tensor from that in the file; None: the tensor is left out.
    """

    def __init__(self, folder: Path, named: Callable[[str], str | None] = str) -> None:
        self._folder, self._named = folder, named
        self.shapes: Shapes = {}
        self._places: dict[str, tuple[Path, str]] = {}  # tensor -> file, and the name in it
        for file in sorted([*folder.glob("model.safetensors"), *folder.glob("model-*-of-*.safetensors")]):
            with open_tensors(file) as tensors:
                for saved in tensors.keys():  # noqa: SIM118
                    self._add(file, saved, tensors.get_slice(saved))
        if not self.shapes:
            raise RunError(f"{folder} has no model.safetensors; {_REMEDY}")

    def _add(self, file: Path, saved: str, tensor: Any) -> None:
        if (name := self._named(saved)) is None:
            return
        if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):  # integers would need scales
            raise RunError(
                f"{file}: {saved} is of {tensor.get_dtype()}, and nlgmoe reads no quantised files; name a conversion to bf16"
            )
        self._places[name] = file, saved  # the last file counts: model.safetensors
        self.shapes[name] = torch.Size(tensor.get_shape())

    def drop(self, prefixes: list[str]) -> list[str]:
        """Leave out the tensors whose names begin so, and return their names."""
        dropped = [name for name in self.shapes if name.startswith(tuple(prefixes))]
        for name in dropped:
            del self.shapes[name]
        return dropped

    def check(self, expected: Shapes, embedding: str) -> None:
        """Check that the files have tensors of these names and shapes, and no others; `embedding` names that of tokens."""
        for name, shape in expected.items():
            if name not in self.shapes:
                raise RunError(f"{self._folder} lacks {name}; {_REMEDY}")
            if self.shapes[name] != shape:
                raise RunError(
                    f"{self._folder}: {name} is {list(self.shapes[name])}, by config.json it is {list(shape)}; {_REMEDY}"
                )
        unknown = self.shapes.keys() - expected.keys()
        if "lm_head.weight" in unknown:  # may be saved though it is tied
            unknown -= {"lm_head.weight"}
            if not torch.equal(self.read("lm_head.weight"), self.read(embedding)):
                raise RunError(
                    f"{self._folder}: lm_head.weight differs from {embedding}, though config.json ties them; {_REMEDY}"
                )
        if unknown:
            raise RunError(f"{self._folder} has {min(unknown)}, which its config.json does not describe; {_REMEDY}")

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Read `tensor[where]`, and no more of the file."""
        file, saved = self._places[name]
        with open_tensors(file) as tensors:
            value: Tensor = tensors.get_slice(saved)[where] if where else tensors.get_tensor(saved)
            return value


def _tokenizer(folder: Path, config: GPTConfig) -> tuple[TokenizerFiles | None, str]:
    """Return the folder's tokenizer and the files beside it, or None and the reason."""
    if not (folder / TOKENIZER).exists() and not (folder / "vocab.json").exists():
        other = ", but tokenizer.model, which is SentencePiece's" if (folder / "tokenizer.model").exists() else ""
        return None, f"{folder} has no {TOKENIZER}{other}"
    try:
        tokenizer = load_tokenizer(str(folder.resolve()), folder)
    except ValueError as error:
        return None, str(error)
    if tokenizer.vocab_size > config.vocab_size:
        return None, f"the tokenizer of {folder} has {tokenizer.vocab_size} ids, the model {config.vocab_size}"
    return tokenizer.files, ""
