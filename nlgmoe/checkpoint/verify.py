"""Verify a checkpoint: on one process, or on all ranks together, each of which reads a share of the files. Describe it."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from nlgmoe.checkpoint import reading
from nlgmoe.checkpoint.entries import Shapes, entry_shapes, optimizer_shapes
from nlgmoe.checkpoint.reading import KINDS, REMEDY, Contents, kind_of, read_document, read_manifest
from nlgmoe.config import GPTConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.optimizer import freeze
from nlgmoe.parts import ForeignCodeError
from nlgmoe.ranks import raise_on_all_ranks
from nlgmoe.validation import list_differences


def find_problems(path: str | Path, rank: int = 0, ranks: int = 1, kinds: Collection[str] = KINDS) -> Iterator[str]:
    """Yield each defect of a checkpoint folder as a line. Raises an OSError if a file exists but cannot be read.

    Reads the files of share `rank` of `ranks` of some kinds; rank 0 also compares names and shapes with the model's.
    """
    try:
        path = reading.resolve_link(Path(path))
        document, files = read_document(path), read_manifest(path)["files"]
        reading.read_tokenizer(path)
        for name in sorted(name for name in files if kind_of(name) in kinds)[rank::ranks]:
            yield from reading.file_problems(path / name, files[name])
        if rank == 0:
            yield from _model_differences(path, document, files)
    except (ValueError, FileNotFoundError) as error:
        yield str(error).removesuffix(f"; {REMEDY}")
    except OSError as error:  # the file may be whole
        raise OSError(error.errno, error.strerror or str(error), error.filename or str(path)) from error
    except (TypeError, KeyError, AttributeError, IndexError) as error:  # valid JSON that nlgmoe did not write
        reason = str(error).partition("\n")[0]  # PyTorch may add the stack
        yield f"{path} is not an nlgmoe checkpoint ({type(error).__name__}: {reason})"


def gather_problems(path: str | Path, kinds: Collection[str]) -> list[str]:
    """Verify a checkpoint on all ranks and return each defect once, on every rank. A collective."""
    if not distributed.is_initialized():
        return list(find_problems(path, kinds=kinds))
    problems_by_rank: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    with raise_on_all_ranks():
        own = list(find_problems(path, distributed.get_rank(), len(problems_by_rank), kinds))
    distributed.all_gather_object(problems_by_rank, own)
    return list(dict.fromkeys(problem for problems in problems_by_rank for problem in problems))


def _model_differences(path: str | Path, document: dict[str, Any], files: dict[str, Contents]) -> Iterator[str]:
    try:
        with torch.device("meta"):
            model = GPT(GPTConfig.from_dict(document["model_config"]))
    except ForeignCodeError:
        return  # the names are unknown without that code
    expected = {"model": entry_shapes(model)}
    if "optimizer_groups" in document and document["global_step"] > 0:
        freeze(model, document.get("frozen", ()))
        groups = document["optimizer_groups"]
        muon = {name for group in groups if group.get("muon") for name in group["param_names"]}
        expected["optimizer"] = optimizer_shapes(model, muon)
    for kind, shapes in expected.items():
        stored: Shapes = {}
        for contents in (contents for file, contents in files.items() if kind_of(file) == kind):
            stored |= {name: torch.Size(shape) for name, (_, shape, _) in contents.items()}
        for difference in list_differences(stored, shapes, limit=None):
            yield f"{path}: {kind} entry {difference}"


def describe(path: Path) -> str:
    """Describe a valid checkpoint in two lines."""
    document, files = read_document(path), read_manifest(path)["files"]
    size = sum(file.stat().st_size for file in path.iterdir())
    use = "resumable" if "optimizer_groups" in document else "weights only: start a run with model.warm_start"
    return (
        f"{path}: step {document['global_step']:,}, {document['tokens_seen']:,} tokens; {use}\n"
        f"valid: {sum(map(len, files.values())):,} tensors in {len(files)} files, {size / 1e6:,.1f} MB"
    )
