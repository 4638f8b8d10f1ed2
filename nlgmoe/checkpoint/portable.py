"""The portable checkpoint: a folder of safetensors and JSON, independent of the number of ranks. Nothing is pickled.

    checkpoint.json   format, model configuration, step and token clock, loops, callbacks, data position, versions
    model             GPT's parameters by name, one entry per expert
    optimizer         `exp_avg/NAME`, `exp_avg_sq/NAME`; of Muon's matrices `momentum_buffer/NAME`: one entry per expert;
                      `step/NAME`, one per parameter
    state             tensors that `checkpoint.json` refers to, such as a callback's
    tokenizer.json    the run's tokenizer, and the model's files beside it

`reading.py` and `writing.py` read and write files, `verify.py` and `run_checkpoints.py` find a valid checkpoint. One process uses
Lightning's `CheckpointIO`, below; DeepSpeed's ranks each write and read their own entries (`parallel/sharded_checkpoint.py`).
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from typing_extensions import override

from nlgmoe.checkpoint import writing
from nlgmoe.checkpoint.entries import (
    join_experts,
    optimizer_from_entries,
    optimizer_to_entries,
    split_experts,
)
from nlgmoe.checkpoint.reading import FORMAT, KINDS, VERSION, Checkpoint, FileRecord
from nlgmoe.checkpoint.run_checkpoints import choose_checkpoint, find_checkpoint
from nlgmoe.config import GPTConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.validation import RunError, SettingError
from nlgmoe.versions import versions

PREFIX = "model."  # name of the GPT in MoEGPTModule


class PortableCheckpointIO(CheckpointIO):
    """Write and read Lightning's checkpoints as portable folders. `MoEGPTModule` sets it in the trainer.

    Attributes:
        to_train: read the optimizer's state too.
    """

    def __init__(self) -> None:
        self.to_train = True

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write Lightning's `checkpoint` dictionary to the folder `path`, which replaces an older one when complete."""
        rest = dict(checkpoint)
        tokenizer = rest.pop("tokenizer", None)
        model = {name.removeprefix(PREFIX): value for name, value in rest.pop("state_dict").items()}
        entries = {"model": split_experts(model)}
        if rest.get("optimizer_states"):
            (state,) = rest.pop("optimizer_states")
            moments, rest["optimizer_groups"] = optimizer_to_entries(state, model)
            # Before its first step AdamW has no state.
            entries["optimizer"] = moments if rest["global_step"] > 0 else {}
        document, entries["state"] = make_document(rest)
        path = Path(path)
        with writing.explain_write_errors(path), writing.new_folder(path) as temporary:
            files: dict[str, FileRecord] = {}
            for kind, tensors in entries.items():
                if tensors:
                    files |= writing.write_tensors(temporary, kind, tensors)
            writing.finish(temporary, path, document, files, tokenizer)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint `path`, or the newest valid one of a run folder, into Lightning's dictionary, on the CPU."""
        files = choose_checkpoint(path, KINDS if self.to_train else ("model", "state"))
        checkpoint = read_checkpoint(files)
        model = join_experts(files.tensors("model").read_all())
        checkpoint["state_dict"] = {PREFIX + name: value for name, value in model.items()}
        if self.to_train and "optimizer_groups" in checkpoint:
            # Before its first step AdamW has no state.
            entries = files.tensors("optimizer", required=checkpoint["global_step"] > 0).read_all()
            checkpoint["optimizer_states"] = [optimizer_from_entries(entries, checkpoint.pop("optimizer_groups"))]
        return checkpoint

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        writing.remove(Path(path))


def use_portable_checkpoints(strategy: Strategy, to_train: bool) -> None:
    """Replace Lightning's default checkpoint format by the portable one."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = PortableCheckpointIO()
    checkpoint_io = strategy.checkpoint_io
    if not isinstance(checkpoint_io, PortableCheckpointIO):
        kind = type(checkpoint_io).__name__
        raise SettingError(f"trainer.plugins: {kind} writes checkpoints that no run here resumes; remove it")
    checkpoint_io.to_train = to_train


def make_document(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert Lightning's dictionary, without weights and optimizer, to `checkpoint.json` and the tensors that it refers to."""
    tensors: dict[str, Tensor] = {}
    plain = _to_json(checkpoint, "", tensors)
    saved_at = datetime.now(UTC).isoformat(timespec="microseconds")
    head = {"format": FORMAT, "version": VERSION, "saved_at": saved_at, "versions": versions()}
    return head | plain, tensors


def read_checkpoint(files: Checkpoint) -> dict[str, Any]:
    """Return Lightning's dictionary without weights and optimizer, but with the checkpoint's `path` and `tokenizer`."""
    tensors = files.tensors("state", required=False).read_all()
    checkpoint: dict[str, Any] = _from_json(files.document, tensors) | {"path": str(files.path)}
    return checkpoint if (tokenizer := files.tokenizer()) is None else checkpoint | {"tokenizer": tokenizer}


def load_model(path: str | Path) -> GPT:
    """Load the trained GPT of a checkpoint, or of the newest valid one of a run folder, on the CPU, in evaluation mode.

    Raises:
        ValueError: there is no checkpoint at `path`, it is damaged, or its weights do not fit its configuration.
    """
    return build_model(find_checkpoint(path))


def build_model(checkpoint: Checkpoint, config: GPTConfig | None = None) -> GPT:
    """Build the trained GPT of a checkpoint with valid weights, on the CPU, in evaluation mode.

    `config`: another one, whose model has the same weights; None: the checkpoint's.
    """
    with torch.device("meta"):
        model = GPT(config or checkpoint.config)
    model.load_state_dict(join_experts(checkpoint.tensors("model").read_all()), assign=True)
    return model.eval()


def _to_json(value: Any, entry: str, tensors: dict[str, Tensor]) -> Any:
    """Convert `value` to plain JSON; tensors are collected in `tensors` and replaced by a reference."""
    if isinstance(value, Tensor):
        tensors[entry] = value.detach().clone()
        return {"$tensor": entry}
    if isinstance(value, dict):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise RunError(f"checkpoint entry {entry}: key {bad[0]!r} is not text; use text keys in state_dict()")
        return {key: _to_json(item, f"{entry}/{key}" if entry else key, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{entry}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kinds = "checkpoints hold numbers, text, lists, dictionaries and tensors only"
    raise RunError(f"checkpoint entry {entry} is a {type(value).__name__}; {kinds}: change what state_dict() returns")


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict) and "$tensor" in value:
        return tensors[value["$tensor"]]
    if isinstance(value, dict):
        return {key: _from_json(item, tensors) for key, item in value.items()}
    return [_from_json(item, tensors) for item in value] if isinstance(value, list) else value
