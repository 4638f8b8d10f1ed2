"""The portable checkpoint: a folder of safetensors and JSON that knows no topology. Nothing is pickled.

    checkpoint.json   format, model configuration, step and token clock, loops, callbacks, data position, versions
    model             GPT's parameters by name, one entry per expert
    optimizer         `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`, again one entry per expert
    state             tensors of callbacks and others that `checkpoint.json` refers to
    tokenizer.json    whose ids the model knows

`folder.py` and `writing.py` know the files, `verify.py` and `newest.py` which one is good. One process writes and reads through
Lightning's `CheckpointIO`, here; ranks of DeepSpeed through their strategy (`parallel/checkpointing.py`), each what it owns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from nlgmoe.checkpoint import writing
from nlgmoe.checkpoint.entries import (
    describe_mismatch,
    join_experts,
    optimizer_from_entries,
    optimizer_to_entries,
    split_experts,
)
from nlgmoe.checkpoint.folder import FORMAT, VERSION, Contents, TensorFiles, read_document
from nlgmoe.checkpoint.newest import choose, time_of_save
from nlgmoe.config import GPTConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.versions import versions

PREFIX = "model."  # where MoEGPTModule keeps its GPT


class PortableCheckpointIO(CheckpointIO):
    """Lightning's checkpoints, as portable folders. `MoEGPTModule` puts it into the trainer.

    Attributes:
        to_train: whether what is loaded is to be trained on: only then is the optimizer's state read.
    """

    def __init__(self) -> None:
        self.to_train = True

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write Lightning's `checkpoint` dictionary to the folder `path`, replacing what is there only when done.

        Raises:
            ValueError: the disk is full, or the folder cannot be written; what was there before is untouched.
        """
        rest = dict(checkpoint)
        tokenizer = rest.pop("tokenizer", None)
        model = {name.removeprefix(PREFIX): value for name, value in rest.pop("state_dict").items()}
        entries = {"model": split_experts(model)}
        if rest.get("optimizer_states"):
            (state,) = rest.pop("optimizer_states")
            entries["optimizer"], rest["optimizer_groups"] = optimizer_to_entries(state)
        document, entries["state"] = make_document(rest, Path(path).parent)
        with writing.explained(Path(path)):
            temporary = writing.begin(Path(path))
            try:
                files: dict[str, Contents] = {}
                for kind, tensors in entries.items():
                    if tensors:
                        files |= writing.write_tensors(temporary, kind, tensors)
                writing.finish(temporary, Path(path), document, files, tokenizer)
            finally:
                writing.abandon(temporary)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the folder `path`, or the newest valid one in a run folder, into Lightning's dictionary; tensors are on the CPU.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = choose(path, self.to_train)
        checkpoint = read_checkpoint(path)
        model = join_experts(TensorFiles(path, "model").read_all())
        checkpoint["state_dict"] = {PREFIX + name: value for name, value in model.items()}
        if self.to_train and "optimizer_groups" in checkpoint:
            # Before its first step AdamW has no state.
            entries = TensorFiles(path, "optimizer", required=checkpoint["global_step"] > 0).read_all()
            checkpoint["optimizer_states"] = [optimizer_from_entries(entries, checkpoint.pop("optimizer_groups"))]
        return checkpoint

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the folder, or the link to one; never the last whole one of its folder."""
        if not writing.remove(Path(path)):
            rank_zero_warn(f"{path} is kept: no other checkpoint beside it is whole")


def make_document(checkpoint: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `checkpoint.json` holds of Lightning's dictionary, weights and optimizer aside, and the tensors it refers to.

    Args:
        checkpoint: Lightning's dictionary.
        folder: that the checkpoint is saved in.

    Raises:
        ValueError: an entry is neither plain data nor a tensor.
    """
    tensors: dict[str, Tensor] = {}
    plain = _to_json(checkpoint, "", tensors)
    head = {"format": FORMAT, "version": VERSION, "saved_at": time_of_save(folder), "versions": versions()}
    return head | plain, tensors


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Undo `make_document`: Lightning's dictionary without weights and optimizer, and the `path` it is from."""
    document = read_document(path)
    found: dict[str, Any] = _from_json(document, TensorFiles(path, "state", required=False).read_all())
    return found | {"path": str(path)}


def load_model(path: str | Path) -> GPT:
    """The trained GPT of a checkpoint folder, on the CPU, in evaluation mode.

    Raises:
        ValueError: there is no checkpoint at `path`, or it is damaged or lacks something.
    """
    config = GPTConfig.from_dict(read_document(path)["model_config"])
    with torch.device("meta"):
        model = GPT(config)
    entries = join_experts(TensorFiles(path, "model").read_all())
    if mismatch := describe_mismatch(model.state_dict(), entries):
        raise ValueError(f"{path} does not hold the model that it describes: {mismatch}; use another checkpoint")
    model.load_state_dict(entries, assign=True)
    return model.eval()


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
