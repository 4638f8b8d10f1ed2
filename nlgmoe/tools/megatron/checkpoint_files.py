"""Read a Megatron-DeepSpeed checkpoint's folder, and check its files.

    global_step1000/
      mp_rank_00_model_states.pt                            all but the experts, and the arguments
      layer_L_expert_E_mp_rank_00_model_states.pt           expert E of the L-th MoE layer, both counted from 0
      (optimizer files, which are not read)

Names are those that follow `language_model.` in Megatron's own model, such as `encoder.layers.3.mlp.dense_h_to_4h.weight`.
"""

from __future__ import annotations

import re
import zipfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from nlgmoe.run.folder import flattened
from nlgmoe.validation import RunError, SettingError

DENSE = "mp_rank_00_model_states.pt"
_EXPERT = re.compile(r"(?:.*\.)?layers\.(\d+)\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")
_ANY_EXPERT = ".deepspeed_moe.experts.deepspeed_experts."
# Packages whose objects a Megatron-DeepSpeed script leaves in a checkpoint.
_PACKAGES = ("apex", "collections", "datetime", "deepspeed", "enum", "megatron", "numpy", "pathlib", "torch", "types")
_NAMES = ("builtins.getattr", "signal.Signals")  # Python 3.11 pickles a member of an enumeration with the first
_NAMESPACE = "argparse.Namespace"


class Placeholder:
    """An object of a file, without its content."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load(file: Path) -> Any:
    """Load a file of `torch.save` to the CPU, without running code from it, and compare its checksums; tensors are memory-mapped.

    PyTorch's restricted unpickler makes tensors and plain containers. A training script's own objects (an enumeration, the state
    of NumPy's generator) become empty placeholders: their packages are neither needed nor imported. Objects of other packages
    are refused.
    """
    if not zipfile.is_zipfile(file):
        raise RunError(
            f"{file} cannot be read (no file of torch.save, or cut off, or of PyTorch before 1.6); copy the checkpoint anew, or "
            "load and save it with a newer PyTorch where it was trained"
        )
    try:
        with zipfile.ZipFile(file) as archive:  # `torch.load` compares no checksums
            if (damaged := archive.testzip()) is not None:
                raise RunError(f"the checksum of {damaged} in it is wrong")
        names = set(get_unsafe_globals_in_checkpoint(file)) - {_NAMESPACE}
        foreign = sorted(name for name in names - {*_NAMES} if name.partition(".")[0] not in _PACKAGES)
        if not foreign:
            placeholders: list[Any] = [(type(name, (Placeholder,), {}), name) for name in names]
            with safe_globals([Namespace, *placeholders]):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many types, for a damaged file
        reason = str(error).strip().partition("\n")[0]
        raise RunError(f"{file} cannot be read ({reason or type(error).__name__}); copy the checkpoint anew") from error
    raise RunError(
        f"{file} holds {foreign[0]}, which no Megatron-DeepSpeed checkpoint needs and which could run code; nothing was read: "
        "get the checkpoint from where it was trained"
    )


@dataclass(frozen=True)
class Dense:
    """Content of `mp_rank_00_model_states.pt`."""

    file: Path  # its path
    args: Namespace  # of the run
    tensors: dict[str, Tensor]  # by name, without experts
    version: float  # of the checkpoint's layout, which decides the order of queries, keys and values
    iteration: int  # optimizer steps
    tokens: int  # trained on


def find_folder(path: Path) -> Path:
    """Find the folder with the files: `path` itself, or the one in it that `latest` names."""
    latest = path / "latest"
    folder = path / latest.read_text(errors="replace").strip() if latest.is_file() else path
    if not (folder / DENSE).is_file():
        raise SettingError(
            f"{folder} has no {DENSE}; name a checkpoint of Megatron-DeepSpeed, such as OUT/global_step1000, saved with "
            "--deepspeed and --no-pipeline-parallel, and with a ZeRO stage below 3"
        )
    return folder


def read_dense(folder: Path) -> Dense:
    """Read everything but the experts."""
    file = folder / DENSE
    state = load(file)
    if not isinstance(state, dict) or not isinstance(state.get("module"), dict):
        raise RunError(
            f"{file} holds no model; use a checkpoint that Megatron-DeepSpeed wrote with --no-pipeline-parallel"
        )
    if not isinstance(state.get("args"), Namespace):
        raise RunError(f"{file} lacks Megatron's arguments, so its model is unknown; use another checkpoint")
    tensors = {
        name.removeprefix("language_model."): value
        for name, value in flattened(state["module"]).items()
        if isinstance(value, Tensor) and _ANY_EXPERT not in name
    }
    version, step, tokens = (state.get(key, 0) for key in ("checkpoint_version", "iteration", "tokens"))
    return Dense(file, state["args"], tensors, float(version), int(step), int(tokens))


class ExpertFiles:
    """Files of a checkpoint's experts, one each; the last one read is cached. `counts`: block with experts -> their number."""

    def __init__(self, folder: Path, counts: dict[int, int]) -> None:
        self._files = {
            (block, expert): folder / f"layer_{layer}_expert_{expert}_{DENSE}"
            for layer, (block, count) in enumerate(counts.items())
            for expert in range(count)
        }
        missing = [file.name for file in self._files.values() if not file.is_file()]
        if missing:
            more = f" and {len(missing) - 1} more of {len(self._files)}" if len(missing) > 1 else ""
            raise RunError(
                f"{folder} has no {missing[0]}{more}; every rank writes its own experts: copy them from all of its nodes"
            )
        self._last: tuple[Path, dict[str, Tensor]] | None = None

    def read(self, block: int, expert: int, part: str) -> tuple[Path, Tensor]:
        """Read one tensor, such as `dense_h_to_4h.weight`; return its file too."""
        file = self._files[block, expert]
        if self._last is None or self._last[0] != file:
            self._last = file, self._read_file(file, block, expert)
        tensors = self._last[1]
        if part not in tensors:
            raise RunError(f"{file} lacks {part}; use another checkpoint")
        return file, tensors[part]

    @staticmethod
    def _read_file(file: Path, block: int, expert: int) -> dict[str, Tensor]:
        content = load(file)
        tensors: dict[str, Tensor] = {}
        for name, value in content.items() if isinstance(content, dict) else ():
            match = _EXPERT.fullmatch(name)
            if match is None or (int(match[1]), int(match[2])) != (block, expert) or not isinstance(value, Tensor):
                raise RunError(
                    f"{file} holds {name}, not only expert {expert} of layer {block}; use another checkpoint"
                )
            tensors[match[3]] = value
        return tensors
