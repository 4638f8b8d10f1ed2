"""Conversion of a folder of Hugging Face's format to a checkpoint: an export of `nlgmoe export`, or a GPT-2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from nlgmoe.checkpoint.entries import EXPERT
from nlgmoe.checkpoint.folder import open_tensors, read_json
from nlgmoe.checkpoint.weights_only import weight_shapes, write_weights
from nlgmoe.config import GPTConfig
from nlgmoe.data.tokenizer import load_tokenizer
from nlgmoe.files import sha256_of
from nlgmoe.tools.hugging_face.configuration_nlgmoe import FIELDS, SHA256
from nlgmoe.tools.hugging_face.export import PREFIX
from nlgmoe.tools.hugging_face.gpt2 import gpt2_config, gpt2_weights
from nlgmoe.validation import RunError, SettingError

READABLE = "nlgmoe (what `nlgmoe export` writes) and gpt2"
_NEEDED = ["*.json", "*.safetensors", "merges.txt"]


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        config: configuration of the model.
        model_type: nlgmoe or gpt2.
        tokenizer: True if the checkpoint has a tokenizer.
        no_tokenizer: reason for which it has none.
    """

    config: GPTConfig
    model_type: str
    tokenizer: bool
    no_tokenizer: str = ""


def import_folder(source: str, checkpoint: str | Path, overwrite: bool = False) -> Imported:
    """Write the checkpoint atomically.

    Args:
        source: the folder, or the name of a model on the Hugging Face hub, such as `openai-community/gpt2`.
        checkpoint: output folder, `NAME.ckpt`.
        overwrite: replace an older checkpoint.

    Raises:
        ValueError: the folder does not exist or is damaged, or its model is not supported.
    """
    folder = _local(source)
    values = _read_json(folder / "config.json")
    model_type = str(values.get("model_type"))
    if model_type == "nlgmoe":
        config = _exported_config(values, folder)
        _check_sha256(folder, values)
        read = _exported_weights(folder, config)
    elif model_type == "gpt2":
        config = gpt2_config(values, folder)
        read = gpt2_weights(folder, config)
    else:
        raise SettingError(f"model_type={model_type} of {folder} cannot be imported; supported are {READABLE}")
    tokenizer, missing = _tokenizer(folder, config)
    write_weights(checkpoint, read, config, tokenizer, overwrite=overwrite)
    return Imported(config, model_type, tokenizer is not None, missing)


def _local(source: str) -> Path:
    """Return the folder, or a download from the hub."""
    if Path(source).is_dir():
        return Path(source)
    try:
        folder = Path(snapshot_download(source, allow_patterns=_NEEDED))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns="*.bin")
        return folder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise (SettingError if isinstance(error, HFValidationError) else ValueError)(
            f"{source} is neither a folder nor a model that the Hugging Face hub provides ({error}); name another source"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise SettingError(f"{file.parent} has no {file.name}; name a folder of Hugging Face's format")
    return read_json(file, "export the model again")


def _exported_config(values: dict[str, Any], folder: Path) -> GPTConfig:
    try:
        return GPTConfig.from_dict({name: values[name] for name in FIELDS if name in values})
    except (TypeError, ValueError) as error:  # a setting is missing, unknown or out of range
        raise RunError(
            f"{folder}/config.json is damaged or of another nlgmoe ({error}); export the model again"
        ) from error


def _check_sha256(folder: Path, values: dict[str, Any]) -> None:
    """Check the files of weights against the sha256 in `config.json`, where it has them."""
    recorded = values.get(SHA256)
    for file in _files(folder):
        if isinstance(recorded, dict) and recorded.get(file.name) != sha256_of(file):
            raise RunError(
                f"{file} is not the file that config.json was exported with (its sha256 differs); export the model again, or "
                f"remove {SHA256} from config.json if the weights were changed on purpose"
            )


def _exported_weights(folder: Path, config: GPTConfig) -> Callable[[str], Tensor]:
    """Check names and shapes of all weights, and return a function that reads an entry of the checkpoint."""
    file_of: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    for file in _files(folder):
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                file_of[name] = file
                part = tensors.get_slice(name)
                shapes[name] = part.get_shape()
                if (dtype := part.get_dtype()) not in ("F64", "F32", "F16", "BF16"):  # integers would need their scales
                    raise RunError(
                        f"{file}: {name} is of {dtype}, not of floating-point numbers; export the model again"
                    )

    # Before entries are enumerated: config.json may contain any number.
    counts = [] if config.moe is None else config.moe.num_experts
    largest = max((shape[0] for shape in shapes.values() if shape), default=0)
    if config.num_layers > len(shapes) or max([counts] if isinstance(counts, int) else counts, default=0) > largest:
        raise RunError(f"{folder} holds fewer layers or experts than config.json says; export the model again")

    def parameter_of(entry: str) -> tuple[str, int | None]:
        match = EXPERT.fullmatch(entry)
        if match is None:
            return PREFIX + entry, None
        return f"{PREFIX}{match['layer']}.{match['part']}", int(match["expert"])

    used = set()
    for entry, shape in weight_shapes(config).items():
        name, expert = parameter_of(entry)
        used.add(name)
        if name not in shapes:
            raise RunError(f"{folder} lacks {name}; export the model again")
        found = shapes[name] if expert is None else shapes[name][1:]
        if found != list(shape) or (expert is not None and expert >= shapes[name][0]):
            raise RunError(
                f"{folder}: {name} is {shapes[name]}, which is not what config.json says; export the model again"
            )
    if unknown := sorted(set(shapes) - used):
        raise RunError(f"{folder} has unknown {unknown[0]} in {file_of[unknown[0]].name}; export the model again")

    def read(entry: str) -> Tensor:
        name, expert = parameter_of(entry)
        with open_tensors(file_of[name]) as tensors:
            value: Tensor = tensors.get_tensor(name) if expert is None else tensors.get_slice(name)[expert]
            return value

    return read


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
        raise RunError(f"{folder} has no model.safetensors; export the model again")
    named = _read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise RunError(f"{index} is damaged (its weight_map does not name files); export the model again")
    names = sorted(set(named.values()))
    for name in names:
        if not (folder / name).is_file():
            raise RunError(f"{folder} has no {name}, which {index.name} names; export the model again")
    return [folder / name for name in names]


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
