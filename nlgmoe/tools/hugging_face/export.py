"""Export of a checkpoint to a folder of Hugging Face's format.

    config.json, generation_config.json        settings; ids of special tokens
    model.safetensors                          or model-00001-of-00004.safetensors, ... and model.safetensors.index.json
    tokenizer.json, tokenizer_config.json      if the checkpoint has a tokenizer; of an imported model its own files, with its
                                               chat template, unchanged
    README.md                                  the model card
    modeling_nlgmoe.py, ...                    the model's sources (`bundled_sources`), unless a family has the model

A model that a family of `families/` computes is written in that family's format, with its names of tensors. Others keep our
names and shapes, with the prefix `model.gpt.`; a layer's experts are one tensor, and tables have no padding rows. At most one
file of weights is in memory at a time.
"""

from __future__ import annotations

import json
import re
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

import nlgmoe
from nlgmoe.checkpoint.entries import dtype_of
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.run_checkpoints import find_checkpoint
from nlgmoe.checkpoint.writing import new_folder, write_error_reason
from nlgmoe.config import GPTConfig
from nlgmoe.data.model_files import CONFIG, GENERATION, IDS, TOKENIZER_CONFIG, named_tokens, special_ids
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.eval.loaded_model import choose_tokenizer
from nlgmoe.model.gpt import GPT
from nlgmoe.parts import MODEL_PARTS, PARTS, require_paper_parts
from nlgmoe.tools.hugging_face.families import FAMILIES, chosen_family
from nlgmoe.tools.hugging_face.families.tensors import own_layout
from nlgmoe.tools.hugging_face.model_card import model_card
from nlgmoe.validation import RunError, SettingError
from nlgmoe.versions import versions

HERE = "nlgmoe.tools.hugging_face"
MODEL, CONFIGURATION = "modeling_nlgmoe", "configuration_nlgmoe"
_ROOT = Path(nlgmoe.__file__).parents[1]
_IMPORT = re.compile(r"^(\s*)from (nlgmoe\.[\w.]+) import\b", re.MULTILINE)
Weights = tuple[dict[str, Tensor], Callable[[str], Tensor]]  # tensors on the meta device, and a function that reads one


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    checkpoint: Path  # the exported checkpoint
    family: str | None  # whose class loads it; None: ours, because of `reason`
    reason: str  # settings that no family has; empty if our code was asked for


def export(
    checkpoint: str | Path,
    folder: str | Path,
    max_shard_size: str = "5GB",
    precision: Literal["fp32", "bf16"] | None = None,
    tokenizer: Tokenizer | None = None,
    family: str | None = None,
) -> Exported:
    """Write `folder` atomically; the arguments are those of `nlgmoe export`, but `tokenizer`, which is loaded.

    Raises:
        ValueError: the checkpoint does not exist, is damaged or has another tokenizer, the family does not compute the model, or
            the folder cannot be written.
    """
    folder = Path(folder).resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise SettingError(f"{folder} exists and is not an empty folder; name another")
    found = find_checkpoint(checkpoint)
    path, document, config = found.path, found.document, found.config
    family, reason = chosen_family(config, family, document.get("family"))
    if family is None:
        rest = [name for name in PARTS if name not in bundled_parts(config)]
        problem = f"no class of transformers computes the model: {reason}; " if reason else ""
        require_paper_parts(config, f"{problem}a folder for transformers holds", rest)
    tokenizer = choose_tokenizer(found, tokenizer)
    meta, read = _weights(found, family, dtype_of(precision))
    files = {} if tokenizer is None else tokenizer.files
    ids = special_ids(files)
    if ids is None:  # of our own making: one token begins, ends and pads texts
        ids = dict.fromkeys(IDS, None if tokenizer is None else tokenizer.eod_id)
    kind = {
        "dtype": str(next(iter(meta.values())).dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
    }
    settings = {
        CONFIG: (_own_settings(config) if family is None else FAMILIES[family].settings(config)) | ids | kind,
        GENERATION: ids | {"transformers_version": transformers.__version__},
    }
    texts = bundled_sources(config) if family is None else {}
    if tokenizer is not None:
        settings[TOKENIZER_CONFIG] = _tokenizer_settings(tokenizer, config)
    texts |= {name: json.dumps(values, indent=2) + "\n" for name, values in settings.items()}
    texts |= {name: text for name, text in files.items() if name != CONFIG}
    padding = None if tokenizer is None or "pad_token" in named_tokens(texts) else tokenizer.decode([tokenizer.eod_id])
    texts["README.md"] = model_card(folder.name, document, tokenizer is not None, family, padding)
    try:
        with new_folder(folder) as temporary:
            _write_weights(temporary, meta, read, max_shard_size)
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8")
            for file in temporary.glob("*.safetensors"):  # safetensors creates files with mode 600
                file.chmod((temporary / "config.json").stat().st_mode)
            temporary.rename(folder)  # fails if another process has written there since
    except (OSError, SafetensorError) as error:
        problem = write_error_reason(error)
        raise RunError(f"{folder} cannot be written ({problem}); make room, or name another folder") from error
    return Exported(path, family, reason)


def _own_settings(config: GPTConfig) -> dict[str, Any]:
    """Return `config.json` with every setting, so that it does not depend on defaults."""
    return {
        "architectures": ["NlgmoeForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION}.NlgmoeConfig",
            "AutoModel": f"{MODEL}.NlgmoeModel",
            "AutoModelForCausalLM": f"{MODEL}.NlgmoeForCausalLM",
        },
        "model_type": "nlgmoe",
        **config.to_dict(),
    }


def bundled_parts(config: GPTConfig) -> dict[str, Any]:
    """Return the parts of a model, by the names of `PARTS`, whose code a folder may contain: attention and scaling of nlgmoe's.

    Routers are none of them, because a folder has no buffers.
    """
    parts = {name: getattr(config, name) for name in MODEL_PARTS}
    return {name: part for name, part in parts.items() if type(part).__module__.startswith("nlgmoe.")}


def bundled_sources(config: GPTConfig) -> dict[str, str]:
    """Return file names and texts of a model's module and of all project modules that it imports: flat files.

        nlgmoe/layers/router.py           nlgmoe_layers_router.py
        from nlgmoe.config import X       from .nlgmoe_config import X

    `transformers` copies `modeling_nlgmoe.py` and the files that it imports by `from .x import` into a package; it does not
    follow folders (`dynamic_module_utils.py`, 5.24). They need only torch and `transformers` (`tests/checkpoint/load_alone.py`).
    The configuration imports the parts that the model names (`bundled_parts`).
    """
    classes = [type(part) for part in bundled_parts(config).values()]
    named = "".join(f"\nfrom {kind.__module__} import {kind.__name__}  # in config.json\n" for kind in classes)
    sources: dict[str, str] = {}
    queue = [f"{HERE}.{MODEL}"]
    while queue:
        module = queue.pop()
        name = f"{flat_name(module)}.py"
        if name not in sources:
            file = f"{module.replace('.', '/')}.py"
            text = (_ROOT / file).read_text(encoding="utf-8") + named * (module == f"{HERE}.{CONFIGURATION}")
            queue += [match[2] for match in _IMPORT.finditer(text)]
            sources[name] = (
                f"# {file} of nlgmoe {versions()['nlgmoe']}, copied by `nlgmoe export`; only its imports differ.\n"
                "# SPDX-License-Identifier: Apache-2.0\n"
            ) + _IMPORT.sub(lambda m: f"{m[1]}from .{flat_name(m[2])} import", text)
    return sources


def flat_name(module: str) -> str:
    """Return a module's name in an exported folder; modules of this package keep their own name."""
    return module.rpartition(".")[2] if module.startswith(f"{HERE}.") else module.replace(".", "_")


def _tokenizer_settings(tokenizer: Tokenizer, config: GPTConfig) -> dict[str, Any]:
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


def _weights(checkpoint: Checkpoint, family: str | None, dtype: torch.dtype | None) -> Weights:
    config, files = checkpoint.config, checkpoint.tensors("model")
    with torch.device("meta"):
        model = GPT(config)
    stored = files.dtypes
    layout = own_layout(config) if family is None else FAMILIES[family].layout(config)
    types: dict[str, torch.dtype] = {}
    buffers = dict(model.named_buffers())  # which keep their precision
    for name, places in layout.of_tensor.items():
        entry = places[0].entry
        types[name] = stored[entry] if dtype is None or entry in buffers else dtype
    meta = {name: torch.empty(shape, dtype=types[name], device="meta") for name, shape in layout.shapes.items()}
    return meta, lambda name: layout.tensor(name, files.read, types[name])


def _write_weights(folder: Path, meta: dict[str, Tensor], read: Callable[[str], Tensor], max_shard_size: str) -> None:
    try:
        split = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
    except ValueError as error:
        raise SettingError(f"max_shard_size={max_shard_size} is not a size; write it such as 5GB or 300MB") from error
    for file, names in split.filename_to_tensors.items():
        save_file({name: read(name) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
