"""Conversion of a GGUF file to a folder of Hugging Face's format, by transformers and the packages `gguf` and `accelerate`.

transformers reads weights, settings, vocabulary and chat template, and some of the pre-tokenizers, which a GGUF file gives by a
name of llama.cpp's.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from nlgmoe.device import available_memory, name_deepspeeds_device
from nlgmoe.validation import RunError, SettingError

_ARCHITECTURE = "llama"  # of GGUF, which transformers reads and we import
_BYTES = 4  # of a value in fp32, to which transformers dequantises
# Names of llama.cpp for pre-tokenizers of byte-level BPE.
_READ = ("gpt-2", "olmo", "llama-bpe", "dbrx")  # by transformers
_PRE = ("tokenizer.ggml.pre", "gpt-2")  # the field of the pre-tokenizer, and its default
_OF_DIGITS = ("smollm", "starcoder")  # each digit is a token; transformers takes GPT-2's pre-tokenizer


@contextmanager
def folder_of_gguf(file: Path, output: Path) -> Iterator[Path]:
    """Convert a file to a temporary folder in `output`, in fp32; it is removed at the end of the block."""
    if not file.is_file():
        raise SettingError(f"there is no file {file}; name a GGUF file")
    require_gguf()
    fields, values = _checked(file)
    output.mkdir(parents=True, exist_ok=True)
    need = values * _BYTES
    if (free := shutil.disk_usage(output).free) < 2 * need:
        raise RunError(f"{output} has {free / 1e9:.1f} GB free, and {file} needs {2 * need / 1e9:.1f} GB; make room")
    if (memory := available_memory()) is not None and memory < 2 * need:
        raise RunError(
            f"this machine has {memory / 1e9:.1f} GB of free memory, and {file} needs {2 * need / 1e9:.1f} GB; import it on a "
            "larger machine"
        )
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{file.name}.") as temporary:
        try:
            _convert(file, Path(temporary), fields.get("tokenizer.ggml.model") == "gpt2")
        except Exception as error:  # of transformers and gguf, of many types
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(f"transformers cannot read {file} ({reason}); download it again, or another file") from error
        _write_tokenizer(Path(temporary), fields)
        yield Path(temporary)


def require_gguf() -> None:
    """Check that the packages are installed with which transformers reads GGUF files."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SettingError(
                f"GGUF files need the package {package}; in the repository's folder: pip install -e '.[gguf]'"
            )


def _checked(file: Path) -> tuple[dict[str, Any], int]:
    """Return the file's fields without lists, and its number of values."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception as error:  # of numpy or gguf, for a file that ends early or is none
        raise RunError(f"{file} is damaged or no GGUF file ({error}); download it again") from error
    fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
    if fields.get("split.count", 1) > 1:
        raise SettingError(
            f"{file} is one of {fields['split.count']} files; join them with `llama-gguf-split --merge`, or name another file"
        )
    if problem := _unread(fields, [tensor.name for tensor in reader.tensors]):
        raise SettingError(
            f"{problem} of {file} cannot be imported; supported is {_ARCHITECTURE} without scaled positions: name a folder of "
            "Hugging Face's format"
        )
    name = fields.get(*_PRE)
    if fields.get("tokenizer.ggml.model") == "gpt2" and name not in (known := _READ + _OF_DIGITS):
        raise SettingError(
            f"tokenizer.ggml.pre={name} of {file} is not known here (known are {', '.join(known)}); name a folder of Hugging "
            "Face's format, whose tokenizer.json has the pre-tokenizer"
        )
    return fields, sum(int(tensor.n_elements) for tensor in reader.tensors)


def _unread(fields: dict[str, Any], tensors: list[str]) -> str | None:
    """Return a property of the model that transformers does not read from a GGUF file; None if there is none."""
    if (architecture := fields.get("general.architecture")) != _ARCHITECTURE:
        return f"general.architecture={architecture}"
    if experts := fields.get("llama.expert_count"):  # Mixtral's are left out
        return f"llama.expert_count={experts}"
    if (scaling := fields.get("llama.rope.scaling.type", "none")) != "none":
        return f"llama.rope.scaling.type={scaling}"
    return "rope_freqs.weight" if "rope_freqs.weight" in tensors else None


def _convert(file: Path, folder: Path, tokenizer: bool) -> None:
    """Write weights, settings and, if the file has one, the tokenizer, as `save_pretrained` does."""
    name_deepspeeds_device()  # transformers imports it
    names: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent.resolve()), "gguf_file": file.name}
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        **names,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model, loading = loaded
    if loading["missing_keys"]:  # they would be drawn at random
        raise RunError(f"it lacks {min(loading['missing_keys'])}")
    # GGUF has 1e-5 as 9.999999747e-06, which is the same number in fp32.
    model.config.rms_norm_eps = float(str(np.float32(model.config.rms_norm_eps)))
    model.save_pretrained(folder, save_original_format=True)
    if tokenizer:
        length = model.config.max_position_embeddings
        transformers.AutoTokenizer.from_pretrained(**names, model_max_length=length).save_pretrained(folder)


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """Give the saved tokenizer what the pre-tokenizer that the file names has, and transformers leaves out."""
    path, name = folder / "tokenizer.json", fields.get(*_PRE)
    if not path.exists():
        return
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if name in _OF_DIGITS:
        parts = [{"type": "Digits", "individual_digits": True}, tokenizer["pre_tokenizer"]]
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    tokenizer["model"]["ignore_merges"] = name == "llama-bpe"
    path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")
