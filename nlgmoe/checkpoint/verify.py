"""Verify a checkpoint: on one process, or on all ranks together, each of which reads a part of the tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from nlgmoe.checkpoint.entries import MOMENTS
from nlgmoe.checkpoint.folder import (
    REMEDY,
    Contents,
    entry_problem,
    file_problems,
    followed,
    kind_of,
    open_tensors,
    read_document,
    read_manifest,
    read_tokenizer,
)
from nlgmoe.checkpoint.layout import Shapes, describe_differences, entry_shapes
from nlgmoe.config import GPTConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.parts import ForeignCodeError


def find_problems(path: str | Path, rank: int = 0, ranks: int = 1) -> Iterator[str]:
    """Yield each defect of a checkpoint folder as a line.

    Args:
        path: the folder.
        rank: part of the tensors to read; rank 0 also compares names and shapes with the model's.
        ranks: number of parts.
    """
    try:
        path = followed(Path(path))
        document, files = read_document(path), read_manifest(path)["files"]
        read_tokenizer(path)
        yield from file_problems(path, files)
        yield from _damaged_tensors(path, files, rank, ranks)
        if rank == 0:
            yield from _model_differences(path, document, files)
    except (ValueError, OSError) as error:
        yield str(error).removesuffix(f"; {REMEDY}")
    except (TypeError, KeyError, AttributeError, IndexError) as error:  # valid JSON that nlgmoe did not write
        reason = str(error).partition("\n")[0]  # PyTorch may add the stack
        yield f"{path} is not an nlgmoe checkpoint ({type(error).__name__}: {reason})"


def gather_problems(path: str | Path) -> list[str]:
    """Verify a checkpoint on all ranks and return each defect once, on every rank. A collective."""
    if not distributed.is_initialized():
        return list(find_problems(path))
    problems_by_rank: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(
        problems_by_rank, list(find_problems(path, distributed.get_rank(), len(problems_by_rank)))
    )
    return list(dict.fromkeys(problem for problems in problems_by_rank for problem in problems))


def _damaged_tensors(folder: Path, files: dict[str, Contents], rank: int, ranks: int) -> Iterator[str]:
    names = [(file, name) for file in sorted(files) for name in sorted(files[file])]
    own_names: dict[str, list[str]] = {}
    for file, name in names[rank::ranks]:
        own_names.setdefault(file, []).append(name)
    for file, wanted in own_names.items():
        # `file_problems` has reported a file that cannot be read.
        with suppress(ValueError), open_tensors(folder / file) as tensors:
            for name in sorted(set(wanted) & set(tensors.keys())):
                if problem := entry_problem(kind_of(file), tensors.get_tensor(name), files[file][name]):
                    yield f"{folder / file}: {name} {problem}"


def _model_differences(path: str | Path, document: dict[str, Any], files: dict[str, Contents]) -> Iterator[str]:
    """Compare the files' entries with those of the model that `checkpoint.json` describes."""
    try:
        with torch.device("meta"):
            model = GPT(GPTConfig.from_dict(document["model_config"]))
    except ForeignCodeError:
        return  # the names are unknown without that code
    expected = {"model": entry_shapes(model)}
    if "optimizer_groups" in document and document["global_step"] > 0:
        trained = entry_shapes(model, buffers=False).items()
        expected["optimizer"] = {f"{moment}/{name}": shape for moment in MOMENTS for name, shape in trained}
        expected["optimizer"] |= {f"step/{name}": torch.Size() for name, _ in model.named_parameters()}
    for kind, shapes in expected.items():
        stored: Shapes = {
            name: torch.Size(shape)
            for file, contents in files.items()
            if kind_of(file) == kind
            for name, (_, shape, _) in contents.items()
        }
        for name, reason in describe_differences(shapes, stored).items():
            yield f"{path}: {kind} entry {name} is {reason}"
