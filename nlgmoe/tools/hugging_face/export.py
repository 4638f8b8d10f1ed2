"""Export of a checkpoint to a folder of Hugging Face's format, with the source files that `transformers` needs to load it.

    config.json, generation_config.json        settings and the sha256 of each file of weights; ids of special tokens
    model.safetensors                          or model-00001-of-00004.safetensors, ... and model.safetensors.index.json
    modeling_nlgmoe.py, ...                    the model's sources (`bundle.py`)
    tokenizer.json, tokenizer_config.json      if the checkpoint has a tokenizer
    README.md                                  the model card

Weights keep their names and shapes in `GPT`, with the prefix `model.`; a layer's experts are one tensor. At most one file of
weights is in memory at a time.
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
from nlgmoe.checkpoint.layout import (
    PRECISIONS,
    Entry,
    describe_differences,
    entry_shapes,
    local_entries,
    summarize_differences,
)
from nlgmoe.checkpoint.newest import find_checkpoint
from nlgmoe.checkpoint.writing import recover_one, write_error_reason
from nlgmoe.config import GPTConfig
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.eval.loaded_model import choose_tokenizer
from nlgmoe.files import sha256_of
from nlgmoe.model.counting import count_parameters
from nlgmoe.model.gpt import GPT
from nlgmoe.parts import require_paper_parts
from nlgmoe.tools.hugging_face.bundle import CONFIGURATION, MODEL, bundled_sources
from nlgmoe.tools.hugging_face.configuration_nlgmoe import SHA256
from nlgmoe.tools.hugging_face.model_card import model_card
from nlgmoe.validation import RunError, SettingError

PREFIX = "model."  # of the GPT in `NlgmoeForCausalLM`
# Files of an earlier export, and files that `transformers` would load instead. The model card is kept: users complete it.
_REPLACED = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_|tokenizer_)?config\.json|"
    r"tokenizer\.json|special_tokens_map\.json|vocab\.json|merges\.txt|(modeling|configuration)_nlgmoe\.py|nlgmoe_\w+\.py"
)


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        checkpoint: the exported checkpoint.
        files: number of files of weights.
        size: bytes of all files.
        tokenizer: True if the folder has a tokenizer.
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
    """Write `folder` atomically.

    Args:
        checkpoint: the folder, `NAME.ckpt`, or a run folder: its newest valid checkpoint is exported.
        folder: a new or empty folder.
        max_shard_size: maximum size of a file of weights, such as `5GB`; a larger tensor gets its own file.
        precision: precision of the weights; None: the stored precision.
        overwrite: write into a folder with files: a model in it is replaced, its model card and other files are kept.
        tokenizer: tokenizer of a checkpoint without one.

    Raises:
        ValueError: the checkpoint does not exist, is damaged or has another tokenizer, or the folder cannot be written.
    """
    folder = Path(folder).resolve()
    if folder.is_file():
        raise SettingError(f"{folder} is a file; name a folder")
    if (folder / "checkpoint.json").exists():  # both formats use the same file names
        raise SettingError(f"{folder} is a checkpoint, which an export would destroy; name another folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise SettingError(f"{folder} exists and is not an empty folder; name another, or add --overwrite")
    path = find_checkpoint(checkpoint)
    document = read_document(path)
    config = GPTConfig.from_dict(document["model_config"])
    require_paper_parts(config.moe, "a folder for transformers holds")
    tokenizer = choose_tokenizer(path, tokenizer, config)
    meta, read = _weights(path, config, PRECISIONS.get(precision or ""))
    recover_one(folder)
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        sha256 = _write_weights(temporary, meta, read, max_shard_size)
        card = model_card(folder.name, document, summary_of(path, document), tokenizer is not None)
        texts = bundled_sources() | {"README.md": card}
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
            (temporary / name).write_text(text, encoding="utf-8")
        for file in temporary.glob("*.safetensors"):  # safetensors creates files with mode 600
            file.chmod((temporary / "config.json").stat().st_mode)
        size = sum(file.stat().st_size for file in temporary.iterdir())
        _put_in_place(temporary, folder, overwrite)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{folder} cannot be written ({write_error_reason(error)}); make room, or name another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(path, len(sha256), size, tokenizer is not None)


def summary_of(checkpoint: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Return `summary.json` of the run that ended with this checkpoint; empty if it is another's, or cannot be read.

    A pruned checkpoint in the run's folder is of as many tokens, but another model.
    """
    size = count_parameters(GPTConfig.from_dict(document["model_config"])).total
    try:
        summary = json.loads((checkpoint.parents[1] / "summary.json").read_text(encoding="utf-8"))
        return summary if (summary["tokens"], summary["params_total"]) == (document["tokens_seen"], size) else {}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


def model_settings(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return `config.json` with every setting, so that it does not depend on defaults."""
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
    """Return `generation_config.json`: the end-of-document token begins, ends and pads texts."""
    ids = {} if tokenizer is None else dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eod_id)
    return {**ids, "transformers_version": transformers.__version__}


def tokenizer_settings(tokenizer: Tokenizer, config: GPTConfig) -> dict[str, Any]:
    """Return `tokenizer_config.json`, with padding on the left, for generation."""
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
    """Return the parameters as meta tensors, and a function that reads one."""
    with torch.device("meta"):
        model = GPT(config)
    files = TensorFiles(path, "model")
    if different := describe_differences(entry_shapes(model), files.shapes):
        raise RunError(
            f"{path} does not hold the model that it describes: {summarize_differences(different)}; use another checkpoint"
        )
    types = {name: record[0] for contents in read_manifest(path)["files"].values() for name, record in contents.items()}
    entries: dict[str, list[Entry]] = {}  # of each parameter: one, or one per expert
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
    folder: Path, meta: dict[str, Tensor], read: Callable[[str], Tensor], max_shard_size: str
) -> dict[str, str]:
    """Write the files of weights and, if there are several, their index; return the sha256 of each file of weights."""
    named = {PREFIX + name: value for name, value in meta.items()}
    try:
        split = split_torch_state_dict_into_shards(named, max_shard_size=max_shard_size)
    except ValueError as error:
        raise SettingError(f"max_shard_size={max_shard_size} is not a size; write it such as 5GB or 300MB") from error
    for file, names in split.filename_to_tensors.items():
        save_file({name: read(name.removeprefix(PREFIX)) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return {file: sha256_of(folder / file) for file in split.filename_to_tensors}


def _put_in_place(temporary: Path, folder: Path, overwrite: bool) -> None:
    """Rename the folder; if the target exists, replace the files of an earlier export in it."""
    if not (overwrite and folder.is_dir()):
        temporary.rename(folder)  # fails if another process has written there since
        return
    # config.json first, and last: without it an incomplete folder cannot be loaded.
    for file in sorted(folder.iterdir(), key=lambda file: file.name != "config.json"):
        if _REPLACED.fullmatch(file.name) and file.is_file():
            file.unlink()
    if (folder / "README.md").exists():
        (temporary / "README.md").unlink()
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        file.rename(folder / file.name)
