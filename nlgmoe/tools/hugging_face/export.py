"""A checkpoint as a folder of Hugging Face's format, with the sources that `transformers` needs to load it.

    config.json, generation_config.json        settings and the sha256 of each file of weights; ids of special tokens
    model.safetensors                          or model-00001-of-00004.safetensors, ... and model.safetensors.index.json
    modeling_nlgmoe.py, ...                    our sources (`bundle.py`)
    tokenizer.json, tokenizer_config.json      as they are in the checkpoint; none if it holds none
    README.md                                  the model card

Weights keep their names and shapes in `GPT` under `model.`: a layer's experts are one tensor. They are read and written file
by file: no more than one file of them is in memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nlgmoe.checkpoint.folder import TensorFiles, read_document, read_manifest
from nlgmoe.checkpoint.layout import PRECISIONS, Entry, entry_shapes, local_entries
from nlgmoe.checkpoint.newest import find
from nlgmoe.checkpoint.warm_start import describe_differences, first_few, stored_shapes
from nlgmoe.checkpoint.writing import reason
from nlgmoe.config import GPTConfig, require_paper_parts
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.eval.loaded_model import choose_tokenizer
from nlgmoe.files import sha256_of
from nlgmoe.model.gpt import GPT
from nlgmoe.tools.hugging_face.bundle import CONFIGURATION, MODEL, bundled_sources
from nlgmoe.tools.hugging_face.configuration_nlgmoe import SHA256
from nlgmoe.tools.hugging_face.model_card import model_card

PREFIX = "model."  # where `NlgmoeForCausalLM` has its GPT
# What an export writes, and what would be loaded in its place if it stayed. The model card, which people complete, stays.
_REPLACED = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_|tokenizer_)?config\.json|"
    r"tokenizer\.json|special_tokens_map\.json|vocab\.json|merges\.txt|(modeling|configuration)_nlgmoe\.py|nlgmoe_\w+\.py"
)


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        checkpoint: that was exported.
        files: of weights.
        size: bytes of all files.
        tokenizer: whether there is one.
    """

    checkpoint: Path
    files: int
    size: int
    tokenizer: bool


def export(
    checkpoint: str | Path,
    folder: str | Path,
    max_shard_size: str = "5GB",
    precision: Literal["fp32", "bf16"] | None = None,
    overwrite: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Exported:
    """Write `folder`, whole or not at all.

    Args:
        checkpoint: the folder, `NAME.ckpt`; of a run's folder, the newest valid one.
        folder: that is new or empty.
        max_shard_size: of a file of weights, such as `5GB`; a tensor that is larger has a file of its own.
        precision: of the weights; None: as they are stored.
        overwrite: write into a folder that has files in it: a model in it is replaced, its model card and other files stay.
        tokenizer: for a checkpoint that holds none.

    Raises:
        ValueError: there is no such checkpoint, it is damaged or holds another tokenizer, or the folder cannot be written.
    """
    folder, bytes_per_file = Path(folder).resolve(), _bytes(max_shard_size)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder")
    if (folder / "checkpoint.json").exists():  # files of both have the same names
        raise ValueError(f"{folder} is a checkpoint, which an export would destroy; name another folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder} exists and is not an empty folder; name another, or add --overwrite")
    path = find(checkpoint)
    document = read_document(path)
    config = GPTConfig.from_dict(document["model_config"])
    require_paper_parts(config, "a folder for transformers holds")
    tokenizer = choose_tokenizer(path, tokenizer, config)
    meta, read = _weights(path, config, PRECISIONS.get(precision or ""))
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        sha256 = _write_weights(temporary, meta, read, bytes_per_file)
        texts = bundled_sources() | {"README.md": model_card(folder.name, document, tokenizer is not None)}
        dtype = next(iter(meta.values())).dtype
        settings = {
            "config.json": model_settings(config, dtype) | {SHA256: sha256},
            "generation_config.json": generation_settings(tokenizer),
        }
        if tokenizer is not None:
            texts["tokenizer.json"] = tokenizer.to_json()
            settings["tokenizer_config.json"] = tokenizer_settings(tokenizer, config)
        texts |= {name: json.dumps(values, indent=2) + "\n" for name, values in settings.items()}
        for name, text in texts.items():
            (temporary / name).write_text(text)
        for file in temporary.glob("*.safetensors"):  # which safetensors lets nobody else read
            file.chmod((temporary / "config.json").stat().st_mode)
        size = sum(file.stat().st_size for file in temporary.iterdir())
        _put_in_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be written ({reason(error)}); make room, or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(path, len(sha256), size, tokenizer is not None)


def model_settings(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json`: every setting, so that it means the same under other defaults."""
    return {
        "architectures": ["NlgmoeForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION}.NlgmoeConfig",
            "AutoModelForCausalLM": f"{MODEL}.NlgmoeForCausalLM",
        },
        "model_type": "nlgmoe",
        "dtype": str(dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
        **config.to_dict(),
    }


def generation_settings(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`generation_config.json`: the end-of-document token begins and ends texts, and pads them."""
    ids = {} if tokenizer is None else dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eod_id)
    return {**ids, "transformers_version": transformers.__version__}


def tokenizer_settings(tokenizer: Tokenizer, config: GPTConfig) -> dict[str, Any]:
    """`tokenizer_config.json`. Padding stands on the left, where generation needs it."""
    end = tokenizer.decode([tokenizer.eod_id])
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), end),
        "model_max_length": config.seq_len,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _weights(
    path: Path, config: GPTConfig, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """Type and shape of each parameter, as tensors without values, and what reads one."""
    with torch.device("meta"):
        model = GPT(config)
    if different := describe_differences(entry_shapes(model), stored_shapes(path)):
        raise ValueError(
            f"{path} does not hold the model that it describes: {first_few(different)}; use another checkpoint"
        )
    files = TensorFiles(path, "model")
    types = {name: record[0] for contents in read_manifest(path)["files"].values() for name, record in contents.items()}
    entries: dict[str, list[Entry]] = {}  # of each parameter: one, or one for each expert
    for entry in local_entries(model):
        entries.setdefault(entry.stack, []).append(entry)
    meta = {
        name: parameter.to(dtype or getattr(torch, types[entries[name][0].name]))
        for name, parameter in model.named_parameters()
    }

    def read(name: str) -> Tensor:
        parts = [files.read(entry.name) for entry in entries[name]]
        whole = parts[0] if entries[name][0].name == name else torch.stack(parts)
        return whole.to(meta[name].dtype).contiguous()

    return meta, read


def _write_weights(
    folder: Path, meta: dict[str, Tensor], read: Callable[[str], Tensor], bytes_per_file: int
) -> dict[str, str]:
    """Write the files of weights and, if they are several, their index; the sha256 of each file of weights."""
    named = {PREFIX + name: value for name, value in meta.items()}
    split = split_torch_state_dict_into_shards(named, max_shard_size=bytes_per_file)
    for file, names in split.filename_to_tensors.items():
        save_file({name: read(name.removeprefix(PREFIX)) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return {file: sha256_of(folder / file) for file in split.filename_to_tensors}


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Give the folder its name; if there is one, replace in it what an export writes."""
    if not folder.is_dir():
        temporary.rename(folder)
        return
    for file in folder.iterdir():
        if _REPLACED.fullmatch(file.name) and file.is_file():
            file.unlink()
    if (folder / "README.md").exists():
        (temporary / "README.md").unlink()
    for file in sorted(
        temporary.iterdir(), key=lambda file: file.name == "config.json"
    ):  # without it nothing is loaded
        file.rename(folder / file.name)


def _bytes(size: str) -> int:
    """`5GB`, `300MB` in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)", size.strip().upper())
    number = float(match[1]) * 1000 ** (1 + ("KB", "MB", "GB", "TB").index(match[2])) if match else 0
    if number < 1:
        raise ValueError(f"max_shard_size={size} is no size; write it such as 5GB or 300MB")
    return int(number)
