"""The portable checkpoint: a folder of safetensors and JSON that knows no topology. Nothing is pickled.

    checkpoint.json   format, model configuration, step and token clock, loops, callbacks, data position, versions
    model             GPT's parameters by name, one entry per expert
    optimizer         `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`, again one entry per expert
    state             tensors of callbacks and others that `checkpoint.json` refers to

`folder.py` knows the files. One process writes and reads through Lightning's `CheckpointIO`, here; ranks of DeepSpeed
through their strategy (`parallel/checkpointing.py`), each what it owns.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from typing_extensions import override

from nlgmoe.checkpoint import folder
from nlgmoe.config import GPTConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.versions import versions

FORMAT = "nlgmoe-portable"
VERSION = 1
PREFIX = "model."  # where MoEGPTModule keeps its GPT
_STACK = re.compile(r"(?P<layer>.*\.moe\.experts)\.(?P<part>\w+)")  # a stacked parameter of `layers/experts.py`
_EXPERT = re.compile(r"(?P<layer>.*\.moe\.experts)\.(?P<expert>\d+)\.(?P<part>\w+)")  # its entry for one expert


class PortableCheckpointIO(CheckpointIO):
    """Lightning's checkpoints, as portable folders. `MoEGPTModule` puts it into the trainer."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write Lightning's `checkpoint` dictionary to the folder `path`, replacing what is there only when done."""
        rest = dict(checkpoint)
        model = {name.removeprefix(PREFIX): value for name, value in rest.pop("state_dict").items()}
        entries = {"model": split_experts(model)}
        if rest.get("optimizer_states"):
            (state,) = rest.pop("optimizer_states")
            entries["optimizer"], rest["optimizer_groups"] = _optimizer_to_entries(state)
        document, entries["state"] = make_document(rest)
        temporary = folder.begin(Path(path))
        try:
            for kind, tensors in entries.items():
                if tensors:
                    folder.write_tensors(temporary, kind, tensors)
            folder.finish(temporary, Path(path), document)
        finally:
            folder.abandon(temporary)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the folder `path` back into Lightning's dictionary; tensors are on the CPU."""
        checkpoint = read_checkpoint(path)
        model = join_experts(folder.TensorFiles(path, "model").read_all())
        checkpoint["state_dict"] = {PREFIX + name: value for name, value in model.items()}
        if "optimizer_groups" in checkpoint:
            # Before its first step AdamW has no state.
            entries = folder.TensorFiles(path, "optimizer", required=checkpoint["global_step"] > 0).read_all()
            checkpoint["optimizer_states"] = [_optimizer_from_entries(entries, checkpoint.pop("optimizer_groups"))]
        return checkpoint

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the folder, or the link to one."""
        folder.remove(Path(path))


def make_document(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `checkpoint.json` holds of Lightning's dictionary, weights and optimizer aside, and the tensors it refers to.

    Raises:
        ValueError: an entry is neither plain data nor a tensor.
    """
    tensors: dict[str, Tensor] = {}
    plain = _to_json(checkpoint, "", tensors)
    return {"format": FORMAT, "version": VERSION, "versions": versions(), **plain}, tensors


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Undo `make_document`: Lightning's dictionary without weights and optimizer."""
    document = read_document(path)
    found: dict[str, Any] = _from_json(document, folder.TensorFiles(path, "state", required=False).read_all())
    return found


def read_document(path: str | Path) -> dict[str, Any]:
    """The `checkpoint.json` of a folder.

    Raises:
        ValueError: there is no checkpoint at `path`, or it is not in this format.
    """
    file = Path(path) / "checkpoint.json"
    if Path(path).is_file():
        raise ValueError(
            f"{path} is a file; a checkpoint here is a folder with checkpoint.json in it (Lightning's own .ckpt files hold "
            "pickled objects and are not read)"
        )
    if not file.is_file():
        raise ValueError(f"no checkpoint at {path}: expected a folder with checkpoint.json in it")
    try:
        document = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); use another checkpoint") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file} is damaged (a {type(document).__name__}, not a mapping); use another checkpoint")
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        found = f"{document.get('format')} version {document.get('version')}"
        raise ValueError(f"{path} is {found}; this nlgmoe reads {FORMAT} version {VERSION}")
    return document


def load_model(path: str | Path) -> GPT:
    """The trained GPT of a checkpoint folder, on the CPU, in evaluation mode.

    Raises:
        ValueError: there is no checkpoint at `path`, or it is damaged or lacks something.
    """
    config = GPTConfig.from_dict(read_document(path)["model_config"])
    with torch.device("meta"):
        model = GPT(config)
    entries = join_experts(folder.TensorFiles(path, "model").read_all())
    if mismatch := describe_mismatch(model.state_dict(), entries):
        raise ValueError(f"{path} does not hold the model that it describes: {mismatch}; use another checkpoint")
    model.load_state_dict(entries, assign=True)
    return model.eval()


def describe_mismatch(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """What keeps `found` from being loaded in place of `expected`; empty if nothing does."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} is {list(found[name].shape)}, not {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + more


def split_experts(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """One entry per expert, `...experts.3.expand_weight`, in place of each stack `...experts.expand_weight`."""
    split: dict[str, Tensor] = {}
    for name, value in entries.items():
        if (match := _STACK.fullmatch(name)) and value.dim() > 0:
            split |= {f"{match['layer']}.{expert}.{match['part']}": value[expert] for expert in range(len(value))}
        else:
            split[name] = value
    return split


def join_experts(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `split_experts`.

    Raises:
        ValueError: the experts of a layer are not numbered 0, 1, 2, ... without a gap.
    """
    joined: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, value in entries.items():
        if match := _EXPERT.fullmatch(name):
            stacks.setdefault(f"{match['layer']}.{match['part']}", {})[int(match["expert"])] = value
        else:
            joined[name] = value
    for name, experts in stacks.items():
        if missing := set(range(max(experts) + 1)) - set(experts):
            raise ValueError(f"the checkpoint lacks expert(s) {sorted(missing)} of {name}")
        joined[name] = torch.stack([experts[index] for index in range(len(experts))])
    return joined


def _optimizer_to_entries(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Split an optimizer's state into named tensors and groups; parameters go by name, never by number."""
    names = {
        index: name
        for group in state["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }
    entries: dict[str, Tensor] = {}
    moments = sorted({moment for values in state["state"].values() for moment in values})
    for moment in moments:
        values = {names[index]: values[moment] for index, values in state["state"].items()}
        entries |= {f"{moment}/{name}": value for name, value in split_experts(values).items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    return entries, groups


def _optimizer_from_entries(entries: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Undo `_optimizer_to_entries`; numbers are given in the order of the names."""
    by_moment: dict[str, dict[str, Tensor]] = {}
    for key, value in entries.items():
        moment, _, name = key.partition("/")
        by_moment.setdefault(moment, {})[name] = value
    by_moment = {moment: join_experts(values) for moment, values in by_moment.items()}
    state: dict[int, dict[str, Tensor]] = {}
    numbered, index = [], 0
    for group in groups:
        numbered.append({**group, "params": list(range(index, index + len(group["param_names"])))})
        for name in group["param_names"]:
            found = {moment: values[name] for moment, values in by_moment.items() if name in values}
            if lacking := sorted(by_moment.keys() - found.keys()):  # AdamW would quietly begin anew with this parameter
                raise ValueError(f"the optimizer's state lacks {lacking[0]} of {name}; use another checkpoint")
            if found:
                state[index] = found
            index += 1
    return {"state": state, "param_groups": numbered}


def _to_json(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON for `value`; tensors move to `tensors` and leave a reference. Anything else is refused by name."""
    if isinstance(value, Tensor):
        tensors[where] = value.detach().clone()
        return {"$tensor": where}
    if isinstance(value, dict):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"checkpoint entry {where}: key {bad[0]!r} is not text; use text keys in state_dict()")
        return {key: _to_json(item, f"{where}/{key}" if where else key, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{where}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"checkpoint entry {where} is a {type(value).__name__}; checkpoints hold numbers, text, lists, dictionaries and "
        "tensors only: change what state_dict() returns"
    )


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return (
            tensors[value["$tensor"]] if "$tensor" in value else {k: _from_json(v, tensors) for k, v in value.items()}
        )
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    return value
