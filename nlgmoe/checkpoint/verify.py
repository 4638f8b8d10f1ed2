"""What is wrong with a checkpoint: alone, or found by all ranks together, each reading its share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from nlgmoe.checkpoint.entries import MOMENTS
from nlgmoe.checkpoint.folder import (
    KINDS,
    OTHER,
    Contents,
    entry_problem,
    file_problems,
    kind_of,
    opened,
    read_document,
    read_manifest,
    read_tokenizer,
)
from nlgmoe.checkpoint.layout import entry_shapes
from nlgmoe.config import GPTConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.parts import ForeignCodeError

# What everyone who reads a checkpoint relies on.
DOCUMENT = {
    "saved_at": str,
    "versions": dict,
    "model_config": dict,
    "global_step": int,
    "tokens_seen": int,
    "seed": int,
}


def problems(path: str | Path, rank: int = 0, ranks: int = 1) -> Iterator[str]:
    """Everything that keeps a folder from being a whole checkpoint, a line each.

    Args:
        path: the folder.
        rank: which share of the tensors to read; rank 0 also holds the names against the model's.
        ranks: number of shares.
    """
    try:
        document, files = read_document(path), read_manifest(path)["files"]
        read_tokenizer(path)
        for name, kind in DOCUMENT.items():
            if not isinstance(document.get(name), kind):
                yield f"{path}/checkpoint.json: {name} is {document.get(name)!r}, not of type {kind.__name__}"
        yield from file_problems(Path(path), files)
        yield from _damaged_tensors(Path(path), files, rank, ranks)
        if rank == 0:
            yield from _wrong_names(path, document, files)
    except (ValueError, OSError) as error:
        yield str(error).removesuffix(f"; {OTHER}")
    except (TypeError, KeyError, AttributeError, IndexError) as error:  # well-formed, but made by something else
        yield f"{path} is no checkpoint of ours ({type(error).__name__}: {error})"


def agreed_problems(path: str | Path) -> list[str]:
    """`problems`, each found once and known to every rank; every rank has to call this."""
    if not distributed.is_initialized():
        return list(problems(path))
    found: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(found, list(problems(path, distributed.get_rank(), len(found))))
    return list(dict.fromkeys(problem for of_rank in found for problem in of_rank))


def _damaged_tensors(folder: Path, files: dict[str, Contents], rank: int, ranks: int) -> Iterator[str]:
    names = [(file, name) for file in sorted(files) for name in sorted(files[file])]
    mine: dict[str, list[str]] = {}
    for file, name in names[rank::ranks]:
        mine.setdefault(file, []).append(name)
    for file, wanted in mine.items():
        try:
            with opened(folder / file) as tensors:
                held = set(tensors.keys())
                for name in wanted:
                    if name not in held:
                        continue
                    if found := entry_problem(kind_of(file), tensors.get_tensor(name), files[file][name]):
                        yield f"{folder / file}: {name} {found}"
        except ValueError:
            continue  # `file_problems` has said it


def _wrong_names(path: str | Path, document: dict[str, Any], files: dict[str, Contents]) -> Iterator[str]:
    """What the model that `checkpoint.json` describes has and the files have not, or the other way round."""
    held = {
        kind: {n: r for f, contents in files.items() if kind_of(f) == kind for n, r in contents.items()}
        for kind in KINDS
    }
    try:
        with torch.device("meta"):
            model = GPT(GPTConfig.from_dict(document["model_config"]))
    except ForeignCodeError:
        return  # only that code knows the names
    except (KeyError, TypeError, ValueError) as error:
        yield f"{path}/checkpoint.json describes no model ({type(error).__name__}: {error})"
        return
    shapes = {name: list(shape) for name, shape in entry_shapes(model).items()}
    expected = {"model": shapes}
    if "optimizer_groups" in document and document.get("global_step", 0) > 0:
        trained = {name: list(shape) for name, shape in entry_shapes(model, buffers=False).items()}
        moments = {f"{moment}/{name}": shape for moment in MOMENTS for name, shape in trained.items()}
        expected["optimizer"] = moments | {f"step/{name}": [] for name, _ in model.named_parameters()}
    for kind, shapes in expected.items():
        for name in sorted(shapes.keys() - held[kind].keys()):
            yield f"{path} lacks {name} ({kind})"
        for name in sorted(held[kind].keys() - shapes.keys()):
            yield f"{path} has unknown {name} ({kind})"
        for name in sorted(shapes.keys() & held[kind].keys()):
            if held[kind][name][1] != shapes[name]:
                yield f"{path}: {name} has shape {held[kind][name][1]}, not the model's {shapes[name]}"
