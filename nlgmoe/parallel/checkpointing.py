"""The portable checkpoint under DeepSpeed: every rank writes and reads what it owns.

To save, each entry is brought together on one of the ranks that share it, which writes it; to load, each rank reads entries
one by one and keeps its part. No rank ever holds the model or the optimizer whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from nlgmoe.checkpoint import writing
from nlgmoe.checkpoint.agreement import all_or_none
from nlgmoe.checkpoint.entries import MOMENTS
from nlgmoe.checkpoint.folder import Contents, TensorFiles
from nlgmoe.checkpoint.layout import Entry, entry_shapes, local_entries
from nlgmoe.checkpoint.portable import make_document
from nlgmoe.parallel.engine_gradients import loss_scaler
from nlgmoe.parallel.engine_state import EngineState
from nlgmoe.roles import DECAYED, role_of

SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@torch.no_grad()
def gather_owned(model: nn.Module, engine: Any, with_moments: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's share of the checkpoint's `model` and `optimizer` entries; the ranks' shares are disjoint and complete.

    Every rank has to call this. Among the ranks that share a parameter, entries go to the one with the least so far.

    Args:
        model: the GPT.
        engine: that trains it.
        with_moments: false leaves `optimizer` empty.
    """
    state = EngineState(engine)
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    loads: dict[Any, list[int]] = {}
    for entry in local_entries(model):
        if not entry.trained:
            if distributed.get_rank() == 0:
                weights[entry.name] = entry.parameter.cpu().clone()
            continue
        ranks = state.ranks_of(entry.parameter)
        load = loads.setdefault(ranks, [0] * distributed.get_world_size(ranks))
        owner = load.index(min(load))
        load[owner] += entry.shape.numel()
        if (weight := state.collect(entry, None, owner)) is not None:
            weights[entry.name] = weight
        if not (with_moments and state.has_moments):
            continue
        for key in MOMENTS:
            if (moment := state.collect(entry, key, owner)) is not None:
                moments[f"{key}/{entry.name}"] = moment
        if weight is not None and entry.leads:
            moments[f"step/{entry.stack}"] = state.step_of(entry.parameter).detach().float().cpu().clone()
    return weights, moments


def save(path: Path, checkpoint: dict[str, Any], model: nn.Module, engine: Any) -> None:
    """Write the folder `path`: every rank its entries, rank 0 the rest. Every rank has to call this.

    Raises:
        ValueError: a rank could not write. Every rank raises, and what had the name before still has it.
    """
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    tokenizer = rest.pop("tokenizer", None)
    trains = "optimizer_states" in checkpoint  # else ModelCheckpoint(save_weights_only=True) asks
    weights, moments = gather_owned(model, engine, with_moments=trains)
    if trains:
        rest |= {"optimizer_groups": optimizer_groups(model, engine), "loss_scale": loss_scale(engine)}
    temporary: list[Path | None] = [None]
    with all_or_none(), writing.explained(path):
        document, tensors = make_document(rest, path.parent)
        if rank == 0:
            temporary = [writing.begin(path)]
    distributed.broadcast_object_list(temporary)
    (where,) = temporary
    assert where is not None
    try:
        files: dict[str, Contents] = {}
        with all_or_none(), writing.explained(path):
            for kind, entries in {"model": weights, "optimizer": moments}.items():
                if entries:
                    files |= writing.write_tensors(where, kind, entries, rank, ranks)
            if tensors and rank == 0:
                files |= writing.write_tensors(where, "state", tensors)
        of_ranks: list[dict[str, Contents]] = [{}] * ranks
        distributed.gather_object(files, of_ranks if rank == 0 else None)
        with all_or_none(), writing.explained(path):
            if rank == 0:
                files = {name: contents for one in of_ranks for name, contents in one.items()}
                writing.finish(where, path, document, files, tokenizer)
    finally:
        if rank == 0:
            writing.abandon(where)


def optimizer_groups(model: nn.Module, engine: Any) -> list[dict[str, Any]]:
    """AdamW's settings and the names they apply to, in two groups as on one process (`optim/param_groups.py`)."""
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    groups = []
    for decay in (True, False):
        settings = next(group for group in base.param_groups if group["decays"] == decay)
        names = [
            name
            for prefix, module in model.named_modules()
            for name, _ in module.named_parameters(prefix=prefix, recurse=False)
            if (role_of(name, module) in DECAYED) == decay
        ]
        kept = {key: value for key, value in settings.items() if key not in ("params", "param_names")}
        groups.append(kept | {"name": "decay" if decay else "no_decay", "moe": False, "param_names": names})
    return groups


def loss_scale(engine: Any) -> dict[str, Any]:
    """The state of fp16's dynamic loss scale; empty in other precisions."""
    scaler = loss_scaler(engine)
    return {} if scaler is None else {key: getattr(scaler, key) for key in SCALE_STATE}


def restore_loss_scale(engine: Any, state: dict[str, Any]) -> None:
    """Go on with it; its window and bounds are the configuration's."""
    if (scaler := loss_scaler(engine)) is not None:
        vars(scaler).update(state)


@torch.no_grad()
def load_weights(model: nn.Module, engine: Any | None, files: TensorFiles) -> None:
    """Read this rank's weights: those it computes with, and its part of the fp32 ones the optimizer steps on.

    Args:
        model: the GPT.
        engine: None in evaluation.
        files: the checkpoint's `model` entries.

    Raises:
        ValueError: an entry is missing, unknown or of another shape.
    """
    check_names(model, files)
    state = EngineState(engine) if engine is not None else None
    for entry in local_entries(model):
        whole = _shaped(files, entry.name, entry)
        entry.parameter.view(-1)[entry.start : entry.stop] = whole.view(-1).to(entry.parameter)
        if state is not None and entry.trained:
            state.put(entry, None, whole.float())


@torch.no_grad()
def load_moments(model: nn.Module, engine: Any, files: TensorFiles) -> None:
    """Read this rank's part of AdamW's state.

    Raises:
        ValueError: an entry is missing or of another shape.
    """
    state = EngineState(engine)
    state.make_moments()
    for entry in local_entries(model):
        if not entry.trained:
            continue
        for key in MOMENTS:
            state.put(entry, key, _shaped(files, f"{key}/{entry.name}", entry))
        state.step_of(entry.parameter).copy_(files.read(f"step/{entry.stack}"))


def _shaped(files: TensorFiles, name: str, entry: Entry) -> Tensor:
    whole = files.read(name)
    if whole.shape != entry.shape:
        raise ValueError(f"{name} of the checkpoint has shape {list(whole.shape)}, not {list(entry.shape)}")
    return whole


def check_names(model: nn.Module, files: TensorFiles) -> None:
    """Whether the files hold exactly the model's entries, those of experts elsewhere included.

    Raises:
        ValueError: they do not; the message names the first that is too few or too many.
    """
    expected = entry_shapes(model).keys()
    for problem, names in {"lacks": expected - files.names, "has unknown": files.names - expected}.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the checkpoint {problem} {min(names)}{more}; use a checkpoint of this model")
