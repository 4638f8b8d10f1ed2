"""A checkpoint's contents as text, without its tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nlgmoe.checkpoint.folder import TOKENIZER, Contents, kind_of, read_document, read_manifest
from nlgmoe.config import PARTS, GPTConfig
from nlgmoe.pyramid import experts_per_layer


def describe(path: Path) -> str:
    """What a valid checkpoint holds, a line for each part."""
    document, manifest = read_document(path), read_manifest(path)
    files = manifest["files"]
    made = document["versions"]
    size = sum(file.stat().st_size for file in path.iterdir())
    lines = [
        f"{path}",
        f"saved      {document['saved_at'][:19].replace('T', ' ')} UTC by nlgmoe {made['nlgmoe']}, torch {made['torch']}",
        f"position   step {document['global_step']:,}, {document['tokens_seen']:,} tokens",
        *(f"{kind:<10} {_held(contents)}" for kind, contents in _by_kind(files).items()),
        *(f"{what:<10} {text}" for what, text in _model(document["model_config"])),
        f"tokenizer  {'with it' if TOKENIZER in manifest else 'not with it: commands need --tokenizer'}",
        f"resumable  {'yes' if 'optimizer_groups' in document else 'no: weights only; start a run with model.warm_start'}",
        f"valid      {sum(map(len, files.values())):,} tensors in {len(files)} files, {size / 1e6:,.1f} MB",
    ]
    return "\n".join(lines)


def _by_kind(files: dict[str, Contents]) -> dict[str, Contents]:
    found: dict[str, Contents] = {}
    for file, contents in sorted(files.items()):
        found.setdefault(kind_of(file), {}).update(contents)
    return found


def _held(contents: Contents) -> str:
    values: dict[str, int] = {}
    for kind, shape, _ in contents.values():
        values[kind] = values.get(kind, 0) + math.prod(shape)
    shown = ", ".join(f"{count:,} values of {kind}" for kind, count in values.items())
    return f"{shown} in {len(contents):,} entries"


def _model(values: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of the model; code outside nlgmoe is named and not imported."""
    foreign = [f"moe.{name}={part['class_path']}" for name in PARTS if (part := (values["moe"] or {}).get(name))]
    paper = values | {"moe": values["moe"] and {k: v for k, v in values["moe"].items() if k not in PARTS}}
    found = [("experts", _experts(GPTConfig.from_dict(paper)))]
    return [*found, *(("parts", f"{one}: its entries are not held against the model") for one in foreign)]


def _experts(config: GPTConfig) -> str:
    blocks: dict[int, list[str]] = {}
    for block, count in enumerate(experts_per_layer(config), 1):
        if count:
            blocks.setdefault(count, []).append(str(block))
    return "; ".join(f"{count} in block {', '.join(where)}" for count, where in blocks.items()) or "none: a dense model"
