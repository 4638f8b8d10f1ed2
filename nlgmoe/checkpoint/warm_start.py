"""Warm start: a new run whose initial weights are those of a checkpoint. Clock, optimizer, data and noise begin at zero.

Each rank reads the entries of the dense part and of its own experts, one at a time; every rank knows the shapes of all, so that
what differs is the same list everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlgmoe.checkpoint.agreement import all_or_none
from nlgmoe.checkpoint.entries import EXPERT
from nlgmoe.checkpoint.folder import TensorFiles, kind_of, read_document, read_manifest, read_tokenizer
from nlgmoe.checkpoint.layout import Entry, Shapes, entry_shapes, local_entries
from nlgmoe.checkpoint.newest import find
from nlgmoe.config import GPTConfig
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.model.gpt import GPT
from nlgmoe.pyramid import experts_per_layer

_BLOCK = re.compile(r"blocks\.(?P<block>\d+)\.(?P<rest>.*)")


@dataclass(frozen=True)
class WarmStart:
    """Start a new run from the weights of a checkpoint, and from nothing else of it.

    Attributes:
        checkpoint: folder of the checkpoint, such as runs/quickstart/checkpoints/last.ckpt; of a run's folder, the newest
            valid one.
        strict: refuse a checkpoint that lacks a tensor of the model, has one that is unknown or one of another shape, or holds
            another tokenizer than the data's; if false, what fits is loaded, the rest keeps its initial values, and what
            differs is listed.
        layers: the checkpoint's block, counted from 0, that each block of the model starts from, such as a student's that
            starts from its teacher's (`nlgmoe student --from-teacher` writes them); dense ones from dense ones, MoE ones from
            those with as many experts. null: from the block of the same number.
    """

    checkpoint: str
    strict: bool = True
    layers: list[int] | None = None


@dataclass(frozen=True)
class Loaded:
    """What came of a warm start.

    Attributes:
        model_config: the model configuration of the checkpoint.
        report: how much was loaded, and on a line each what differs.
    """

    model_config: dict[str, Any]
    report: str


@torch.no_grad()
def load_initial_weights(
    model: GPT,
    start: WarmStart,
    keep: Callable[[Entry, Tensor], None] | None = None,
    tokenizer: str | None = None,
) -> Loaded:
    """Put the checkpoint's weights into `model`. Where there are ranks, every rank has to call this.

    Args:
        model: the GPT, or a rank's part of it.
        start: from what.
        keep: what else to do with each entry that is loaded, in the type it is stored in.
        tokenizer: the data's, as JSON; None: the checkpoint's is not compared with it.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, it does not fit (see `WarmStart.strict`), or nothing of it
            does. Every rank raises.
    """
    with all_or_none():
        # Of one checkpoint only the weights are read, and checked; of a run folder the newest valid one is looked for.
        path = find(start.checkpoint)
        model_config = read_document(path)["model_config"]
        files, here, stored = TensorFiles(path, "model"), entry_shapes(model), stored_shapes(path)
        if start.layers is not None:
            check_layers(start.layers, GPTConfig.from_dict(model_config), model.config, path)
        taken = _taken(stored, start.layers)
        there = {name: stored[source] for name, source in taken.items()}
        fitting = {name for name, shape in here.items() if there.get(name) == shape}
        different = describe_differences(here, there)
        if tokenizer is not None and not _same_ids(tokenizer, read_tokenizer(path)):
            different = {"token_embedding.weight": "of another tokenizer than data.tokenizer"} | different
        if not fitting:
            raise ValueError(
                f"{start.checkpoint} has nothing that fits the model: {first_few(different)}; use another one"
            )
        if different and start.strict:
            raise ValueError(
                f"the weights of {path} do not fit the model: {first_few(different)}; use another checkpoint, or "
                "model.warm_start.strict=false to load what fits"
            )
        for entry in local_entries(model):
            if entry.name in fitting:
                whole = files.read(taken[entry.name])
                entry.parameter.view(-1)[entry.start : entry.stop] = whole.view(-1).to(entry.parameter)
                if keep is not None:
                    keep(entry, whole)
    total, loaded = (sum(here[name].numel() for name in names) for names in (here, fitting))
    blocks = "" if start.layers is None else f", blocks {', '.join(map(str, start.layers))} (counted from 0)"
    lines = [f"the weights are those of {path}{blocks}: loaded {loaded:,} of {total:,} values"]
    return Loaded(model_config, "\n  ".join(lines + grouped(different)))


def _same_ids(ours: str, theirs: str | None) -> bool:
    """Compare two tokenizers; a checkpoint may hold none."""
    if theirs is None or theirs == ours:
        return True
    return Tokenizer.from_json(ours, "of the run").has_same_ids(Tokenizer.from_json(theirs, "of the checkpoint"))


def check_layers(layers: list[int], theirs: GPTConfig, ours: GPTConfig, path: Path) -> None:
    """Whether each block of `ours` can start from the block of `theirs` that `layers` names.

    Raises:
        ValueError: there are too few or too many, one is out of range, or of another kind.
    """
    given = f"model.warm_start.layers={layers}"
    if len(layers) != ours.num_layers:
        raise ValueError(
            f"{given} has {len(layers)} blocks, the model has {ours.num_layers}; name one of {path} for each, or set it to null"
        )
    kinds = experts_per_layer(theirs)
    for block, (layer, experts) in enumerate(zip(layers, experts_per_layer(ours), strict=True)):
        if not 0 <= layer < theirs.num_layers:
            raise ValueError(
                f"{given}: there is no block {layer} in {path}; its blocks are 0 to {theirs.num_layers - 1}"
            )
        if kinds[layer] != experts:
            like = [number for number, count in enumerate(kinds) if count == experts]
            which = (
                f"use one of {', '.join(map(str, like))}" if like else "it has none like that; change model.config.moe"
            )
            raise ValueError(
                f"{given}: block {block} of the model is {_kind(experts)}, block {layer} of {path} {_kind(kinds[layer])}; {which}"
            )


def _kind(experts: int) -> str:
    return f"MoE with {experts} experts" if experts else "dense"


def _taken(stored: Iterable[str], layers: list[int] | None) -> dict[str, str]:
    """Name that an entry has in the model -> its name in the checkpoint, of all entries that the model is to have."""
    if layers is None:
        return {name: name for name in stored}
    taken = {}
    for name in stored:
        match = _BLOCK.fullmatch(name)
        if match is None:
            taken[name] = name
        else:
            of_block = int(match["block"])
            taken |= {
                f"blocks.{block}.{match['rest']}": name for block, layer in enumerate(layers) if layer == of_block
            }
    return taken


def describe_differences(here: Shapes, there: Shapes) -> dict[str, str]:
    """Entry -> why it is not loaded, for each that is not in the model and the checkpoint in one shape; other shapes first."""
    found = {
        name: f"{list(there[name])} in the checkpoint, {list(shape)} here, initialised"
        for name, shape in here.items()
        if name in there and there[name] != shape
    }
    found |= {name: "not in the checkpoint, initialised" for name in here if name not in there}
    return found | {name: "not in the model, left out" for name in there if name not in here}


def grouped(different: dict[str, str]) -> list[str]:
    """A line each, but one for all the experts of a layer whose reasons are alike: `...experts.[0-3,6].expand_bias: ...`."""
    experts: dict[tuple[str, str, str], list[int]] = {}
    lines: dict[Any, str] = {}  # in the order of the entries
    for name, reason in different.items():
        if match := EXPERT.fullmatch(name):
            key = match["layer"], match["part"], reason
            experts.setdefault(key, []).append(int(match["expert"]))
            lines[key] = f"{match['layer']}.[{_ranges(experts[key])}].{match['part']}: {reason}"
        else:
            lines[name] = f"{name}: {reason}"
    return list(lines.values())


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def first_few(different: dict[str, str], count: int = 3) -> str:
    """The first few of `describe_differences`, in a line."""
    named = ", ".join(
        f"{name} ({reason.removesuffix(', initialised')})" for name, reason in list(different.items())[:count]
    )
    more = len(different) - count
    return f"{named} and {more} more" if more > 0 else named


def stored_shapes(folder: Path) -> Shapes:
    """Shape of each `model` entry of a checkpoint."""
    files = {name: contents for name, contents in read_manifest(folder)["files"].items() if kind_of(name) == "model"}
    return {name: torch.Size(record[1]) for contents in files.values() for name, record in contents.items()}
