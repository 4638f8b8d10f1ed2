"""Write a weights-only checkpoint from another source, for evaluation or for `model.warm_start`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import Any

import lightning
import torch
import yaml
from torch import Tensor

from nlgmoe.checkpoint import writing
from nlgmoe.checkpoint.entries import Shapes, entry_shapes
from nlgmoe.checkpoint.portable import make_document
from nlgmoe.checkpoint.reading import Checkpoint, FileRecord, run_config
from nlgmoe.config import GPTConfig
from nlgmoe.data.model_files import TokenizerFiles
from nlgmoe.files import atomic_write, yaml_beside
from nlgmoe.model.gpt import GPT
from nlgmoe.optim.token_schedule import LearningRateSchedule
from nlgmoe.validation import require

# settings of a run's `data` that NAME.yaml repeats
OF_RUN = ("data_dir", "corpus", "tokenizer", "document_attention", "mask_eod_loss", "micro_batch_size", "seq_len")
WINDOW = 2048  # most tokens of a sequence that NAME.yaml trains on and evaluates: 8 such sequences are a micro-batch
SHARD_VALUES = 2**28  # maximum of values in a file with several entries, and so in memory at a time


def write_weights(
    path: str | Path,
    read: Callable[[str], Tensor],
    config: GPTConfig,
    tokenizer: TokenizerFiles | None = None,
    overwrite: bool = False,
    origin: str | None = None,
    source: Path | None = None,
    document: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the folder `path` file by file under a temporary name, and rename it when it is complete.

    Args:
        path: the checkpoint, `NAME.ckpt`.
        read: returns an entry by its name, such as `blocks.1.moe.experts.3.up_weight`; called once for each, and
            consecutively for those of one expert.
        tokenizer: the tokenizer and the model's files beside it; None writes no tokenizer.
        origin: source of the weights in words, the first line of `NAME.yaml`, which has settings to use the checkpoint with;
            None: no such file.
        source: checkpoint that the weights are from; the settings name the corpus of its run.
        document: further entries of `checkpoint.json`, such as `family`: that of `transformers` that the model was imported from,
            and that an export prefers.
    """
    path, shards = Path(path), _shards(weight_shapes(config))
    _require_free(path, overwrite)
    if origin is not None:
        _require_free(yaml_beside(path), overwrite)
    require(
        path.is_symlink() or not _is_resumable(path),
        f"{path} is not replaced by weights alone: a run can be resumed from it; name another",
    )
    entries_of_run = {
        # Read by Lightning and `MoEGPTModule` in evaluation.
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "model_config": config.to_dict(),
        "tokens_seen": 0,
        "non_finite": {"skipped": 0, "in_a_row": 0},
        "seed": 0,
    }
    whole, _ = make_document({**entries_of_run, **document})
    with writing.explain_write_errors(path), writing.new_folder(path) as temporary:
        files: dict[str, FileRecord] = {}
        for number, names in enumerate(shards):
            entries = {name: read(name) for name in names}
            files |= writing.write_tensors(temporary, "model", entries, number, len(shards))
        _require_free(path, overwrite)  # another process may have written it meanwhile
        writing.finish(temporary, path, whole, files, tokenizer)
    if origin is not None:
        _write_settings(path, config, tokenizer is not None, origin, source)


def _write_settings(checkpoint: Path, config: GPTConfig, tokenizer: bool, origin: str, source: Path | None) -> None:
    file = yaml_beside(checkpoint)
    warm_start = {"checkpoint": str(checkpoint), "strict": True, "layers": None}
    settings: dict[str, Any] = {"model": {"config": config.to_dict(), "warm_start": warm_start}}
    if (run := None if source is None else run_config(source)) is not None:  # over its file, where its schedules ended
        settings["model"] |= {"schedule": asdict(LearningRateSchedule(shape="constant")), "curriculum": None}
    of_run = {} if run is None else yaml.safe_load(run.read_text(encoding="utf-8"))
    data = {name: value for name, value in of_run.get("data", {}).items() if name in OF_RUN and value is not None}
    data |= {"tokenizer": str(checkpoint)} if tokenizer else {}
    data["seq_len"] = min(data.get("seq_len", WINDOW), config.seq_len)
    settings["data"] = data
    settings["trainer"] = {"default_root_dir": str(checkpoint.with_suffix("")), **without_logger(of_run)}
    head = (
        f"# {origin}. Measure its loss, or train from its weights:\n"
        f"#   python train.py validate --config {quote(str(file))} --ckpt_path {quote(str(checkpoint))}\n"
        f"#   python train.py fit --config {quote(str(file))} --model.train_tokens N --model.optimizer.lr RATE\n"
    )
    with atomic_write(file) as temporary:
        temporary.write_text(head + yaml.safe_dump(settings, sort_keys=False, width=120), encoding="utf-8")


def without_logger(settings: Mapping[str, Any]) -> dict[str, None]:
    """Return the change to `trainer` by which a new run does not write into the files of another run's own logger."""
    return {} if isinstance(settings.get("trainer", {}).get("logger"), bool | None) else {"logger": None}


def _require_free(path: Path, overwrite: bool) -> None:
    require(overwrite or not path.exists(), f"{path} exists already; name another, or add --overwrite")


def _is_resumable(path: Path) -> bool:
    """Return True if a run can be resumed from `path`; False if it cannot be read."""
    try:
        return "optimizer_groups" in Checkpoint(path).document
    except (ValueError, OSError):
        return False


def weight_shapes(config: GPTConfig) -> Shapes:
    """Return the shape of every entry of a model."""
    with torch.device("meta"):
        return entry_shapes(GPT(config))


def _shards(shapes: Shapes) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    values = 0
    for name, shape in shapes.items():
        if shards[-1] and values + shape.numel() > SHARD_VALUES:
            shards.append([])
            values = 0
        shards[-1].append(name)
        values += shape.numel()
    return shards
