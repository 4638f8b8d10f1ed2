"""Verify a checkpoint: on one process, or on all ranks together, each of which reads a share of the files. Describe it."""

import json
from collections.abc import Collection, Iterator

import torch
import xxhash
from torch import Tensor

from nlgmoe.checkpoint.entries import entry_shapes, optimizer_shapes
from nlgmoe.checkpoint.reading import KINDS, REMEDY, Checkpoint, kind_of, open_tensors
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.optimizer import freeze
from nlgmoe.parts import ForeignCodeError
from nlgmoe.ranks import gather, raise_on_all_ranks, rank_and_ranks
from nlgmoe.validation import list_differences


def find_problems(
    checkpoint: Checkpoint, rank: int = 0, ranks: int = 1, kinds: Collection[str] = KINDS
) -> Iterator[str]:
    """Yield each defect of a checkpoint as a line: files of some kinds that are missing or differ from their checksums.

    Reads the files of share `rank` of `ranks`, and compares the names and shapes of all entries with the model's. Raises an
    OSError if a file exists but cannot be read: it may be undamaged.
    """
    try:
        differences = list(_model_differences(checkpoint))
        yield from filter(None, map(checkpoint.problem_of, checkpoint.file_names(kinds)[rank::ranks]))
        yield from differences
    except (ValueError, FileNotFoundError) as error:
        yield str(error).removesuffix(f"; {REMEDY}")


def gather_problems(checkpoint: Checkpoint, kinds: Collection[str]) -> list[str]:
    """Verify a checkpoint on all ranks and return each defect once, on every rank. A collective."""
    with raise_on_all_ranks():
        own = list(find_problems(checkpoint, *rank_and_ranks(), kinds))
    return list(dict.fromkeys(problem for problems in gather(own) for problem in problems))


def _model_differences(checkpoint: Checkpoint) -> Iterator[str]:
    document = checkpoint.document
    try:
        with torch.device("meta"):
            model = GPT(checkpoint.config)
    except ForeignCodeError:
        return  # the names are unknown without that code
    expected = {"model": entry_shapes(model)}
    if "optimizer_groups" in document and document["global_step"] > 0:
        freeze(model, document.get("frozen", ()))
        groups = document["optimizer_groups"]
        muon = {name for group in groups if group.get("muon") for name in group["param_names"]}
        expected["optimizer"] = optimizer_shapes(model, muon)
    for kind, shapes in expected.items():
        for difference in list_differences(checkpoint.tensors(kind, required=False).shapes, shapes, limit=None):
            yield f"{checkpoint.path}: {kind} entry {difference}"


def hash_of_weights(checkpoint: Checkpoint) -> str:
    """Return a hash of the weights by name, which does not depend on the number of files. A collective.

    It reads all weights once: each rank hashes the tensors of a share of the files.
    """
    entries: dict[str, list[object]] = {}
    rank, ranks = rank_and_ranks()
    with raise_on_all_ranks():
        for name in sorted(name for name in checkpoint.files if kind_of(name) == "model")[rank::ranks]:
            with open_tensors(checkpoint.path / name, backend="pread") as tensors:
                entries |= {entry: _record_of(tensors.get_tensor(entry)) for entry in tensors.keys()}  # noqa: SIM118
    united = {entry: record for own in gather(entries) for entry, record in own.items()}
    return xxhash.xxh3_64_hexdigest(json.dumps(united, sort_keys=True).encode())


def _record_of(tensor: Tensor) -> list[object]:
    """Return a tensor's type, shape and checksum."""
    checksum = xxhash.xxh3_64_hexdigest(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), checksum]


def describe(checkpoint: Checkpoint) -> str:
    """Describe a valid checkpoint in two lines."""
    document = checkpoint.document
    contents = [record["tensors"] for record in checkpoint.files.values() if "tensors" in record]
    size = sum(file.stat().st_size for file in checkpoint.path.iterdir())
    use = "resumable" if "optimizer_groups" in document else "weights only: start a run with model.warm_start"
    return (
        f"{checkpoint.path}: step {document['global_step']:,}, {document['tokens_seen']:,} tokens; {use}\n"
        f"valid: {sum(map(len, contents)):,} tensors in {len(contents)} files, {size / 1e6:,.1f} MB"
    )
