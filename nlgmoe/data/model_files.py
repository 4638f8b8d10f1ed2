"""Files that travel with a tokenizer, so that a chat model stays one: chat template, special tokens, settings of generation.

A folder of Hugging Face's format and a checkpoint have the same files. Whatever reads a tokenizer reads those beside it, and
whatever writes one writes them, unchanged: import, training, pruning, upcycling, export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nlgmoe.validation import RunError

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG, GENERATION, CONFIG, TEMPLATE = (
    "tokenizer_config.json",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
)
BESIDE = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", TEMPLATE, GENERATION, CONFIG)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # settings kept of a model's config.json

TokenizerFiles = dict[str, str]
"""Name -> content: `tokenizer.json`, and those of `BESIDE` that there are; `config.json` has `IDS` alone."""


def read_beside(folder: Path) -> TokenizerFiles:
    """Read the files beside a folder's tokenizer."""
    try:
        files = {name: (folder / name).read_bytes().decode() for name in BESIDE if (folder / name).is_file()}
    except UnicodeDecodeError as error:
        raise RunError(f"a file of settings in {folder} is not UTF-8 ({error}); replace it") from error
    if CONFIG in files:
        settings = _settings(files, CONFIG)
        files[CONFIG] = json.dumps({name: settings[name] for name in IDS if name in settings})
    return files


def named_tokens(files: Mapping[str, str]) -> dict[str, str]:
    """Return the special tokens that the settings name, such as `{"eos_token": "<|im_end|>"}`."""
    settings = _settings(files, "special_tokens_map.json") | _settings(files, TOKENIZER_CONFIG)
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def special_ids(files: Mapping[str, str]) -> dict[str, Any] | None:
    """Return `IDS` of the model's config.json, those that it has; None if there is no config.json."""
    return _settings(files, CONFIG) if CONFIG in files else None


def end_ids(files: Mapping[str, str], vocabulary: Mapping[str, int]) -> list[int]:
    """Return the ids that end a text, of the first file that names any; empty if none does."""
    for name in (GENERATION, CONFIG):
        if (ids := _settings(files, name).get("eos_token_id")) is not None:
            return list(ids) if isinstance(ids, list) else [ids]
    token = named_tokens(files).get("eos_token")
    return [vocabulary[token]] if token is not None and token in vocabulary else []


def chat_template(files: Mapping[str, str]) -> str | None:
    """Return the template of conversations, in Jinja; None if the model has none."""
    if TEMPLATE in files:
        return files[TEMPLATE]
    template = _settings(files, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template


def _settings(files: Mapping[str, str], name: str) -> dict[str, Any]:
    """Parse a file of JSON; empty if there is none."""
    try:
        settings = json.loads(files.get(name, "{}"))
    except ValueError as error:
        raise RunError(f"{name} beside the tokenizer is damaged ({error}); replace it") from error
    if not isinstance(settings, dict):
        raise RunError(f"{name} beside the tokenizer is no mapping; replace it")
    return settings
