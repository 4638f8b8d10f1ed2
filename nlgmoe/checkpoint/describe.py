"""Describe a checkpoint's contents as text, without reading its tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nlgmoe.checkpoint.folder import TOKENIZER, Contents, kind_of, read_document, read_manifest
from nlgmoe.config import GPTConfig
from nlgmoe.parts import PARTS
from nlgmoe.pyramid import experts_per_layer


def describe(path: Path) -> str:
    """Describe a valid checkpoint, one line for each part."""
    document, manifest = read_document(path), read_manifest(path)
    files, saved_by = manifest["files"], {"nlgmoe": "unknown", "torch": "unknown"} | document["versions"]
    by_kind: dict[str, Contents] = {}
    for file, contents in sorted(files.items()):
        by_kind.setdefault(kind_of(file), {}).update(contents)
    size = sum(file.stat().st_size for file in path.iterdir())
    start = f", from the weights of {document['started_from']}" if "started_from" in document else ""
    lines = [
        f"{path}",
        f"saved      {document['saved_at'][:19].replace('T', ' ')} UTC by nlgmoe {saved_by['nlgmoe']}, torch {saved_by['torch']}",
        f"position   step {document['global_step']:,}, {document['tokens_seen']:,} tokens{start}",
        *(f"{kind:<10} {_count_values(contents)}" for kind, contents in by_kind.items()),
        *_describe_model(document["model_config"]),
        f"tokenizer  {'included' if TOKENIZER in manifest else 'not included: commands need --tokenizer'}",
        f"resumable  {'yes' if 'optimizer_groups' in document else 'no: weights only; start a run with model.warm_start'}",
        f"valid      {sum(map(len, files.values())):,} tensors in {len(files)} files, {size / 1e6:,.1f} MB",
    ]
    return "\n".join(lines)


def _count_values(contents: Contents) -> str:
    values: dict[str, int] = {}
    for dtype, shape, _ in contents.values():
        values[dtype] = values.get(dtype, 0) + math.prod(shape)
    counts = ", ".join(f"{count:,} values of {dtype}" for dtype, count in values.items())
    return f"{counts} in {len(contents):,} entries"


def _describe_model(values: dict[str, Any]) -> list[str]:
    """Describe the experts, and name parts that are not the paper's; those from outside nlgmoe are not imported."""
    moe = values.get("moe") or {}
    parts = {f"moe.{name}": str(part["class_path"]) for name in PARTS if (part := moe.get(name))}
    unknown = ": its entries are not compared with the model"
    without_parts = {key: value for key, value in moe.items() if key not in PARTS} or None
    blocks: dict[int, list[str]] = {}
    for block, count in enumerate(experts_per_layer(GPTConfig.from_dict(values | {"moe": without_parts}))):
        if count:
            blocks.setdefault(count, []).append(str(block))
    experts = "; ".join(f"{count} in block {', '.join(numbers)}" for count, numbers in blocks.items())
    return [
        f"experts    {experts or 'none: a dense model'}",
        *(f"parts      {name}={path}{'' if path.startswith('nlgmoe.') else unknown}" for name, path in parts.items()),
    ]
