"""Conversion of a folder of Hugging Face's format to a checkpoint: an export of `nlgmoe export`, or an open model.

Tensors are read one by one, so that memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from nlgmoe.checkpoint.entries import EXPERT
from nlgmoe.checkpoint.folder import open_tensors, read_json
from nlgmoe.checkpoint.layout import Shapes
from nlgmoe.checkpoint.weights_only import weight_shapes, write_weights
from nlgmoe.config import GPTConfig
from nlgmoe.data.tokenizer import load_tokenizer
from nlgmoe.files import settings_of
from nlgmoe.tools.hugging_face.configuration_nlgmoe import FIELDS
from nlgmoe.tools.hugging_face.families import entry_reader, gpt_config, require_family, tensor_shapes
from nlgmoe.validation import RunError, SettingError

PREFIX = "model."  # of the GPT in `NlgmoeForCausalLM`
_NEEDED = ["*.json", "*.safetensors", "merges.txt"]
_REMEDY = "download or save the model again"


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        config: configuration of the model.
        model_type: the family.
        yaml: file of settings beside the checkpoint.
        tokenizer: True if the checkpoint has a tokenizer.
        no_tokenizer: reason for which it has none.
    """

    config: GPTConfig
    model_type: str
    yaml: Path
    tokenizer: bool
    no_tokenizer: str = ""


def import_folder(source: str, checkpoint: str | Path, overwrite: bool = False) -> Imported:
    """Write the checkpoint atomically, and a YAML file beside it with which `train.py` uses it.

    Args:
        source: the folder, or the name of a model on the Hugging Face hub, such as `allenai/OLMoE-1B-7B-0924`.
        checkpoint: output folder, `NAME.ckpt`; the YAML file is `NAME.yaml`.
        overwrite: replace an older checkpoint.

    Raises:
        ValueError: the folder does not exist or is damaged, or its model is not supported.
    """
    folder = _local(source)
    values = _read_json(folder / "config.json")
    model_type = str(values.get("model_type"))
    if model_type == "nlgmoe":
        config, files = _exported_config(values, folder), WeightFiles(folder)
        read = _exported_weights(files, config)
    else:
        require_family(model_type, folder)
        config, files = gpt_config(values, folder), WeightFiles(folder)
        files.check(tensor_shapes(config, model_type))
        read = entry_reader(config, model_type, files.read)
    tokenizer, missing = _tokenizer(folder, config)
    origin = f"{source}, by `nlgmoe import`"
    write_weights(checkpoint, read, config, tokenizer, overwrite=overwrite, origin=origin)
    return Imported(config, model_type, settings_of(Path(checkpoint)), tokenizer is not None, missing)


def _local(source: str) -> Path:
    """Return the folder, or a download from the hub."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")):
        raise SettingError(f"there is no folder {source}; name a folder, or a model of the Hugging Face hub")
    try:
        return Path(snapshot_download(source, allow_patterns=_NEEDED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise (SettingError if isinstance(error, HFValidationError) else RunError)(
            f"{source} is neither a folder nor a model that the Hugging Face hub provides ({error}); name another source"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise SettingError(f"{file.parent} has no {file.name}; name a folder of Hugging Face's format")
    return read_json(file, _REMEDY)


class WeightFiles:
    """The tensors of a folder's safetensors files.

    Args:
        folder: with `model.safetensors`, or the files that `model.safetensors.index.json` names.

    Attributes:
        shapes: of each tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.shapes: Shapes = {}
        self._file_of: dict[str, Path] = {}
        for file in _files(folder):
            with open_tensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    if (dtype := part.get_dtype()) not in ("F64", "F32", "F16", "BF16"):  # integers would need scales
                        raise RunError(f"{file}: {name} is of {dtype}, not of floating-point numbers; {_REMEDY}")
                    if name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")):
                        continue  # buffers in old files
                    self._file_of[name] = file
                    self.shapes[name] = torch.Size(part.get_shape())
        if "wte.weight" in self.shapes:  # a GPT-2 that was saved without its head
            self._file_of = {f"transformer.{name}": file for name, file in self._file_of.items()}
            self.shapes = {f"transformer.{name}": shape for name, shape in self.shapes.items()}
            self._saved_prefix = "transformer."
        else:
            self._saved_prefix = ""

    def check(self, expected: Shapes) -> None:
        """Check that the files have tensors of these names and shapes, and no others."""
        for name, shape in expected.items():
            if name not in self.shapes:
                fused = [found for found in self.shapes if "experts.gate_up_proj" in found]
                more = (
                    f": it has {fused[0]}, of a fused format; save it with save_original_format=True" if fused else ""
                )
                raise RunError(f"{self._folder} lacks {name}{more or f'; {_REMEDY}'}")
            if self.shapes[name] != shape:
                raise RunError(
                    f"{self._folder}: {name} is {list(self.shapes[name])}, by config.json it is {list(shape)}; {_REMEDY}"
                )
        unknown = self.shapes.keys() - expected.keys()
        embedding = next((name for name in expected if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
        if embedding is not None and "lm_head.weight" in unknown:  # may be saved though it is tied
            unknown -= {"lm_head.weight"}
            if not torch.equal(self.read("lm_head.weight"), self.read(embedding)):
                raise RunError(
                    f"{self._folder}: lm_head.weight differs from {embedding}, though config.json ties them; {_REMEDY}"
                )
        if unknown:
            raise RunError(f"{self._folder} has {min(unknown)}, which its config.json does not describe; {_REMEDY}")

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Read a tensor, or `tensor[index]`."""
        with open_tensors(self._file_of[name]) as tensors:
            saved = name.removeprefix(self._saved_prefix)
            value: Tensor = tensors.get_tensor(saved) if index is None else tensors.get_slice(saved)[index]
            return value


def _files(folder: Path) -> list[Path]:
    """Return the folder's files of weights."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        if index.exists():
            raise RunError(
                f"{folder} has model.safetensors and {index.name}, of two models; remove the one that is not meant"
            )
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise RunError(f"{folder} has no model.safetensors; {_REMEDY}")
    named = _read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise RunError(f"{index} is damaged (its weight_map does not name files); {_REMEDY}")
    names = sorted(set(named.values()))
    for name in names:
        if not (folder / name).is_file():
            raise RunError(f"{folder} has no {name}, which {index.name} names; {_REMEDY}")
    return [folder / name for name in names]


def _exported_config(values: dict[str, Any], folder: Path) -> GPTConfig:
    try:
        return GPTConfig.from_dict({name: values[name] for name in FIELDS if name in values})
    except (TypeError, ValueError) as error:  # a setting is missing, unknown or out of range
        raise RunError(
            f"{folder}/config.json is damaged or of another nlgmoe ({error}); export the model again"
        ) from error


def _exported_weights(files: WeightFiles, config: GPTConfig) -> Callable[[str], Tensor]:
    """Return a function that reads an entry of an export, which has the experts of a layer in one tensor."""
    largest = max((shape[0] for shape in files.shapes.values() if shape), default=0)
    counts = [] if config.moe is None else config.moe.num_experts
    # Before entries are enumerated: config.json may contain any number.
    if (
        config.num_layers > len(files.shapes)
        or max([counts] if isinstance(counts, int) else counts, default=0) > largest
    ):
        raise RunError("config.json says more layers or experts than the files hold; export the model again")

    def place_of(entry: str) -> tuple[str, int | None]:
        match = EXPERT.fullmatch(entry)
        return (
            (PREFIX + entry, None)
            if match is None
            else (f"{PREFIX}{match['layer']}.{match['part']}", int(match["expert"]))
        )

    expected: Shapes = {}
    for entry, shape in weight_shapes(config).items():
        name, expert = place_of(entry)
        expected[name] = shape if expert is None else torch.Size((expert + 1, *shape))  # the last one is the count
    files.check(expected)
    return lambda entry: files.read(*place_of(entry))


def _tokenizer(folder: Path, config: GPTConfig) -> tuple[str | None, str]:
    """Return the folder's tokenizer as JSON, or None and the reason."""
    file = folder / "tokenizer.json"
    if not file.exists() and not (folder / "vocab.json").exists():
        return None, f"{folder} has no tokenizer.json"
    try:
        tokenizer = load_tokenizer(str(folder.resolve()), folder)
    except ValueError as error:
        return None, str(error)
    if tokenizer.vocab_size > config.vocab_size:
        return None, f"the tokenizer of {folder} has {tokenizer.vocab_size} ids, the model {config.vocab_size}"
    return file.read_text(encoding="utf-8") if file.exists() else tokenizer.to_json(), ""
