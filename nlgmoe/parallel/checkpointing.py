"""The portable checkpoint under DeepSpeed: every rank writes and reads what it owns, whatever the ZeRO stage and degree.

A parameter's fp32 value and Adam moments lie flat, in fragments, on the ranks that share it: one fragment each under ZeRO 1
and 2, everything everywhere under ZeRO 0. To save, each entry (a dense parameter, or one expert of a stack) is brought
together on one of those ranks, which writes it; to load, each rank reads entries one by one and keeps its fragments. No rank
ever holds the model or the optimizer whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, distributed, nn

from nlgmoe.checkpoint import folder
from nlgmoe.checkpoint.folder import TensorFiles
from nlgmoe.checkpoint.portable import make_document
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.moe import MoELayer
from nlgmoe.optim.param_groups import decays

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint, and where it lies in this rank's model.

    Attributes:
        name: in the checkpoint.
        stack: name of the parameter that holds it: itself, or a stack of experts.
        leads: whether it stands for its whole stack: AdamW counts one number of steps for all of it.
        parameter: that holds it.
        start: of its values in the flat parameter.
        shape: of the entry.
    """

    name: str
    stack: str
    leads: bool
    parameter: nn.Parameter
    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        """End of its values in the flat parameter."""
        return self.start + self.shape.numel()


def local_entries(model: nn.Module) -> Iterator[Entry]:
    """The entries whose parameters this rank has: all dense ones, and those of the experts that live here."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if not isinstance(module, Experts):
                yield Entry(name, name, True, parameter, 0, parameter.shape)
                continue
            for index in range(len(parameter)):
                expert, shape = module.first + index, parameter.shape[1:]
                one = f"{prefix}.{expert}.{name.rpartition('.')[2]}"
                yield Entry(one, name, expert == 0, parameter, index * shape.numel(), shape)


def check_names(model: nn.Module, files: TensorFiles) -> None:
    """Whether the files hold exactly the model's entries, those of experts elsewhere included.

    Raises:
        ValueError: they do not; the message names the first that is too few or too many.
    """
    expected = set()
    for prefix, module in model.named_modules():
        if isinstance(module, MoELayer):
            parts = [name for name, _ in module.experts.named_parameters()]
            count = module.router.num_experts
            expected |= {f"{prefix}.experts.{expert}.{part}" for expert in range(count) for part in parts}
        if not isinstance(module, Experts):
            expected |= {name for name, _ in module.named_parameters(prefix=prefix, recurse=False)}
    for problem, names in {"lacks": expected - files.names, "has unknown": files.names - expected}.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the checkpoint {problem} {min(names)}{more}; use a checkpoint of this model")


class EngineState:
    """Reads and writes the fp32 weights and Adam moments of an engine, entry by entry.

    Args:
        engine: a DeepSpeed engine with its optimizer.
    """

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        self._base = getattr(engine.optimizer, "optimizer", engine.optimizer)  # torch's AdamW
        self._zero = isinstance(engine.optimizer, DeepSpeedZeroOptimizer)
        self._master: dict[nn.Parameter, Tensor] = {}
        if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
            for half, full in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
                self._master |= dict(zip(half, full, strict=True))
        # Under ZeRO an AdamW state belongs to a flat group: the flat tensor of each parameter.
        self._flat: dict[nn.Parameter, Tensor] = {}
        if self._zero:
            for flat, members in zip(
                self._optimizer.single_partition_of_fp32_groups, self._optimizer.bit16_groups, strict=True
            ):
                self._flat |= dict.fromkeys(members, flat)
            if self.has_moments:
                self._link_moments()

    def ranks_of(self, parameter: nn.Parameter) -> Any:
        """The ranks that share a parameter."""
        name = getattr(parameter, "group_name", None)
        if name is None:
            return deepspeed_groups._get_data_parallel_group()
        return deepspeed_groups._get_expert_data_parallel_group(name)

    @property
    def has_moments(self) -> bool:
        """Whether a step has been taken (or a checkpoint loaded): before that AdamW has no state."""
        return len(self._base.state) > 0

    def step_of(self, parameter: nn.Parameter) -> Tensor:
        """AdamW's count of steps."""
        step: Tensor = self._base.state[self._owner(parameter)]["step"]
        return step

    def fragment(self, parameter: nn.Parameter, key: str | None) -> tuple[int, Tensor] | None:
        """This rank's part of a parameter's value (`key` None) or moment, and where it starts in the flat parameter."""
        if self._zero:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            return None if mapping is None else (mapping.lp_fragment_address.start, mapping.get_hp_fragment(key))
        owner = self._owner(parameter)
        return 0, (owner if key is None else self._base.state[owner][key]).detach().view(-1)

    def collect(self, entry: Entry, key: str | None, to: int) -> Tensor | None:
        """Bring an entry together on rank `to` of the ranks that share it; None elsewhere. On the CPU, fp32."""
        ranks = self.ranks_of(entry.parameter)
        here = distributed.get_rank(ranks)
        found = self.fragment(entry.parameter, key)
        if not self._zero:  # every rank has all of it
            assert found is not None
            return found[1][entry.start : entry.stop].float().cpu().view(entry.shape).clone() if here == to else None
        whole = torch.zeros(entry.shape.numel(), device=entry.parameter.device)
        if found is not None:
            start, values = found
            first, last = max(start, entry.start), min(start + len(values), entry.stop)
            if first < last:
                whole[first - entry.start : last - entry.start] = values[first - start : last - start]
        distributed.reduce(whole, distributed.get_global_rank(ranks, to), group=ranks)
        return whole.cpu().view(entry.shape) if here == to else None

    def put(self, entry: Entry, key: str | None, whole: Tensor) -> None:
        """Keep this rank's part of an entry."""
        found = self.fragment(entry.parameter, key)
        if found is None:
            return
        start, values = found
        first, last = max(start, entry.start), min(start + len(values), entry.stop)
        if first < last:
            values[first - start : last - start] = whole.view(-1)[first - entry.start : last - entry.start]

    def make_moments(self) -> None:
        """Give AdamW its (zero) state before its first step, so that it can be filled."""
        targets = self._optimizer.single_partition_of_fp32_groups if self._zero else None
        if targets is None:
            targets = [parameter for group in self._base.param_groups for parameter in group["params"]]
        for target in targets:
            state = self._base.state[target]
            state["step"] = torch.zeros((), dtype=torch.float32, device=target.device)
            state |= {key: torch.zeros_like(target) for key in MOMENTS}
        if self._zero:
            self._link_moments()

    def _link_moments(self) -> None:
        """DeepSpeed does so once, when the first group has stepped: too early for the other groups."""
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def _owner(self, parameter: nn.Parameter) -> Tensor:
        """The tensor under which AdamW keeps a parameter's state."""
        if self._zero:
            return self._flat[parameter]
        return self._master.get(parameter, parameter)


@torch.no_grad()
def gather_owned(model: nn.Module, engine: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's share of the checkpoint's `model` and `optimizer` entries; the ranks' shares are disjoint and complete.

    Every rank has to call this. Among the ranks that share a parameter, entries go to the one with the least so far.
    """
    state = EngineState(engine)
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    loads: dict[Any, list[int]] = {}
    for entry in local_entries(model):
        ranks = state.ranks_of(entry.parameter)
        load = loads.setdefault(ranks, [0] * distributed.get_world_size(ranks))
        owner = load.index(min(load))
        load[owner] += entry.shape.numel()
        if (weight := state.collect(entry, None, owner)) is not None:
            weights[entry.name] = weight
        if not state.has_moments:
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
    weights, moments = gather_owned(model, engine)
    if "optimizer_states" in checkpoint:
        rest |= {"optimizer_groups": optimizer_groups(model, engine), "loss_scale": loss_scale(engine)}
    else:
        moments = {}
    temporary: list[Path | None] = [None]
    with _all_or_none(path):
        document, tensors = make_document(rest)
        if rank == 0:
            temporary = [folder.begin(path)]
    distributed.broadcast_object_list(temporary)
    (where,) = temporary
    assert where is not None
    with _all_or_none(path):
        for kind, entries in {"model": weights, "optimizer": moments}.items():
            if entries:
                folder.write_tensors(where, kind, entries, rank, ranks)
        if tensors and rank == 0:
            folder.write_tensors(where, "state", tensors)
    with _all_or_none(path):
        if rank == 0:
            folder.finish(where, path, document)


@contextmanager
def _all_or_none(path: Path) -> Iterator[None]:
    """Go on only if no rank raised."""
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    found: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, None if mine is None else f"{mine}")
    for rank, message in enumerate(found):
        if message is not None:
            raise ValueError(f"rank {rank} could not write the checkpoint {path}: {message}") from mine


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
            if decays(module, name.rpartition(".")[2]) == decay
        ]
        kept = {key: value for key, value in settings.items() if key not in ("params", "param_names")}
        groups.append(kept | {"name": "decay" if decay else "no_decay", "moe": False, "param_names": names})
    return groups


def loss_scale(engine: Any) -> dict[str, Any]:
    """The state of fp16's dynamic loss scale; empty in other precisions."""
    state = vars(_loss_scaler(engine))
    return {key: state[key] for key in SCALE_STATE if key in state}


def restore_loss_scale(engine: Any, state: dict[str, Any]) -> None:
    """Go on with it; its window and bounds are the configuration's."""
    vars(_loss_scaler(engine)).update(state)


def _loss_scaler(engine: Any) -> Any:
    if not engine.fp16_enabled():
        return SimpleNamespace()
    zero = isinstance(engine.optimizer, DeepSpeedZeroOptimizer)
    return engine.optimizer.loss_scaler if zero else engine.optimizer.loss_scale_config


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
        if state is not None:
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
        for key in MOMENTS:
            state.put(entry, key, _shaped(files, f"{key}/{entry.name}", entry))
        state.step_of(entry.parameter).copy_(files.read(f"step/{entry.stack}"))


def _shaped(files: TensorFiles, name: str, entry: Entry) -> Tensor:
    whole = files.read(name)
    if whole.shape != entry.shape:
        raise ValueError(f"{name} of the checkpoint has shape {list(whole.shape)}, not {list(entry.shape)}")
    return whole
