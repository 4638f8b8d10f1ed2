"""Save and load the portable checkpoint under DeepSpeed: every entry is written and read by one rank.

To save, an entry is gathered on one of the ranks that share it, which writes it; to load, one of them reads it and sends it to
the others, which keep their shards. No rank ever holds the whole model or optimizer.
"""

import shutil
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from nlgmoe.checkpoint import writing
from nlgmoe.checkpoint.entries import (
    MOMENTS,
    MOMENTUM,
    Entry,
    Shapes,
    entry_shapes,
    local_entries,
    optimizer_shapes,
)
from nlgmoe.checkpoint.portable import make_document
from nlgmoe.checkpoint.reading import REMEDY, Checkpoint, FileRecord, TensorFiles
from nlgmoe.parallel.engine import EngineState, loss_scaler
from nlgmoe.ranks import of_rank_zero, raise_on_all_ranks
from nlgmoe.roles import DECAYED, role_of
from nlgmoe.validation import RunError, list_differences

LOSS_SCALE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
Wanted = dict[Any, dict[str, Callable[[Tensor], object]]]  # group of ranks that share entries -> entry -> its receiver


@torch.no_grad()
def gather_owned_entries(
    model: nn.Module, engine: Any, with_moments: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the `model` and `optimizer` entries that this rank writes; each entry has one writer. A collective.

    Among the ranks that share a parameter, entries go to the one with the fewest values so far.
    """
    state = EngineState(engine)
    if with_moments and not state.has_moments:  # all steps were skipped
        with torch.inference_mode(False):  # a validation's: steps update the moments later
            state.init_moments()
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    loads: dict[Any, list[int]] = {}  # group of ranks -> values that each writes
    for entry in local_entries(model):
        ranks = state.ranks_of(entry.parameter)
        load = loads.setdefault(ranks, [0] * distributed.get_world_size(ranks))
        owner = load.index(min(load))
        load[owner] += entry.shape.numel()
        if (weight := state.gather(entry, None, owner)) is not None:
            weights[entry.name] = weight
        if not with_moments or not entry.trained:
            continue
        kinds = state.moments_of(entry.parameter)
        for key in kinds:
            if (moment := state.gather(entry, key, owner)) is not None:
                moments[f"{key}/{entry.name}"] = moment
        if weight is not None and entry.holds_step and kinds == MOMENTS:
            moments[f"step/{entry.stack}"] = state.step_of(entry.parameter).detach().float().cpu().clone()
    return weights, moments


def save(path: Path, checkpoint: dict[str, Any], model: nn.Module, engine: Any) -> None:
    """Write the folder `path`: every rank its entries, rank 0 the rest. A collective."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    with raise_on_all_ranks():
        if checkpoint.get("state_dict"):
            raise RunError(
                "a callback has put weights into checkpoint['state_dict'], which ExpertParallelStrategy collects from the ranks "
                "itself: keep them under another name, or train on one process or with ddp"
            )
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    tokenizer = rest.pop("tokenizer", None)
    resumable = "optimizer_states" in checkpoint  # absent with ModelCheckpoint(save_weights_only=True)
    # Before its first step AdamW has no state.
    weights, moments = gather_owned_entries(model, engine, with_moments=resumable and checkpoint["global_step"] > 0)
    if resumable:
        rest |= {"optimizer_groups": optimizer_groups(model, engine), "loss_scale": loss_scale(engine)}
    temporary: Path | None = None
    with raise_on_all_ranks(), writing.explain_write_errors(path):
        document, tensors = make_document(rest)
        if rank == 0:
            temporary = writing.begin(path)
    folder = of_rank_zero(temporary)
    assert folder is not None
    try:
        files: dict[str, FileRecord] = {}
        with raise_on_all_ranks(), writing.explain_write_errors(path):
            for kind, entries in {"model": weights, "optimizer": moments}.items():
                if entries:
                    files |= writing.write_tensors(folder, kind, entries, rank, ranks)
            if tensors and rank == 0:
                files |= writing.write_tensors(folder, "state", tensors)
        files_of_ranks: list[dict[str, FileRecord]] = [{}] * ranks
        distributed.gather_object(files, files_of_ranks if rank == 0 else None)
        with raise_on_all_ranks(), writing.explain_write_errors(path):
            if rank == 0:
                files = {name: record for rank_files in files_of_ranks for name, record in rank_files.items()}
                writing.finish(folder, path, document, files, tokenizer)
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def optimizer_groups(model: nn.Module, engine: Any) -> list[dict[str, Any]]:
    """Return the optimizer's settings and parameter names, in the groups of a single process (`optim/optimizer.py`)."""
    state, kinds = EngineState(engine), ("decay", "no_decay", "muon")
    names: dict[str, list[str]] = {kind: [] for kind in kinds}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if parameter.requires_grad:
                decays = role_of(name, module) in DECAYED
                is_muon = MOMENTUM in state.moments_of(parameter)
                names["muon" if is_muon else "decay" if decays else "no_decay"].append(name)
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    groups = []
    for kind in kinds:
        decays, is_muon = kind != "no_decay", kind == "muon"
        alike = (
            group for group in base.param_groups if (group["decays"], group.get("muon", False)) == (decays, is_muon)
        )
        settings: dict[str, Any] = next(alike, {})
        kept = {key: value for key, value in settings.items() if key not in ("params", "param_names", "lr_scale")}
        if names[kind] or not is_muon:
            groups.append(kept | {"name": kind, "moe": False, "param_names": names[kind]})
    return groups


def loss_scale(engine: Any) -> dict[str, Any]:
    """Return the state of fp16's dynamic loss scale; empty in other precisions."""
    scaler = loss_scaler(engine)
    return {} if scaler is None else {key: getattr(scaler, key) for key in LOSS_SCALE_KEYS}


def restore_loss_scale(engine: Any, state: dict[str, Any]) -> None:
    """Restore the state of the loss scale; window and bounds remain those of the configuration."""
    if (scaler := loss_scaler(engine)) is not None:
        vars(scaler).update(state)


@torch.no_grad()
def load_weights(model: nn.Module, engine: Any | None, checkpoint: Checkpoint, device: torch.device) -> None:
    """Load this rank's weights, and its shard of the engine's fp32 copies; in evaluation there is no engine. A collective."""
    files = _open(checkpoint, "model", entry_shapes(model))
    state = EngineState(engine) if engine is not None else None

    def receive(entry: Entry, value: Tensor) -> None:
        entry.copy_(value)
        if state is not None:
            state.load(entry, None, value.float())

    wanted: Wanted = {}
    for entry in local_entries(model):
        wanted.setdefault(EngineState.ranks_of(entry.parameter), {})[entry.name] = partial(receive, entry)
    read_shared(files, wanted, device)


@torch.no_grad()
def load_moments(model: nn.Module, engine: Any, checkpoint: Checkpoint, device: torch.device) -> None:
    """Load this rank's shard of the optimizer's state. A collective."""
    state = EngineState(engine)
    state.init_moments()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    muon = [name for name, parameter in trained if MOMENTUM in state.moments_of(parameter)]
    files = _open(checkpoint, "optimizer", optimizer_shapes(model, muon))
    wanted: Wanted = {distributed.group.WORLD: {}}
    for entry in local_entries(model):
        if entry.trained:
            kinds = state.moments_of(entry.parameter)
            if kinds == MOMENTS:
                wanted[distributed.group.WORLD][f"step/{entry.stack}"] = state.step_of(entry.parameter).copy_
            receivers = wanted.setdefault(state.ranks_of(entry.parameter), {})
            for key in kinds:
                receivers[f"{key}/{entry.name}"] = partial(state.load, entry, key)
    read_shared(files, wanted, device)


def _open(checkpoint: Checkpoint, kind: str, shapes: Shapes) -> TensorFiles:
    with raise_on_all_ranks():
        files = checkpoint.tensors(kind)
        if different := list_differences(files.shapes, shapes):
            raise RunError(f"{files.folder} does not hold this run's {kind}: {', '.join(different)}; {REMEDY}")
    return files


def read_shared(files: TensorFiles, wanted: Wanted, device: torch.device) -> None:
    """Read each entry on one of the ranks that share it, which sends it to the others. A collective.

    The ranks of a group read at the same time, each an entry of its share, and send these in turn: a rank holds two entries. One
    that cannot read sends zeros, so that none waits for it; in the end all ranks raise its error. `wanted` are the entries of
    this rank, by group; all ranks have the same kinds of groups in the same order.
    """
    failure: Exception | None = None
    for ranks, receivers in wanted.items():
        rank = distributed.get_rank(ranks)
        for names in zip_longest(*files.divide(receivers, distributed.get_world_size(ranks))):
            own: Tensor | None = None
            if names[rank] is not None:
                try:
                    own = files.read(names[rank]).to(device)
                except Exception as error:
                    failure, own = failure or error, files.empty(names[rank], device)
            for reader, name in enumerate(names):
                if name is None:
                    continue
                value = own if own is not None and reader == rank else files.empty(name, device)
                if len(names) > 1:
                    distributed.broadcast(value, distributed.get_global_rank(ranks, reader), group=ranks)
                receivers[name](value)
    with raise_on_all_ranks():
        if failure is not None:
            raise failure
