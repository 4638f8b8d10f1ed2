"""`nlgmoe import`: convert a folder in Hugging Face's format into a checkpoint of weights."""

from __future__ import annotations

from pathlib import Path

from nlgmoe.cli.errors import UsageError


def import_checkpoint(source: str, checkpoint: str, overwrite: bool = False) -> None:
    """Convert a folder written by nlgmoe export, or a GPT-2 in Hugging Face's format, into a checkpoint.

    Args:
        source: the folder, or the name of a model on the Hugging Face hub, such as openai-community/gpt2.
        checkpoint: output folder, `NAME.ckpt`; use it, export it, or start runs from it with model.warm_start.
        overwrite: replace an existing checkpoint.

    Raises:
        ValueError: the folder does not exist or is damaged, or its model is not supported.
    """
    check_new_checkpoint(checkpoint, overwrite)
    from nlgmoe.checkpoint.folder import read_manifest  # these need torch
    from nlgmoe.model.counting import count_parameters
    from nlgmoe.tools.hugging_face.importing import import_folder

    check_new_checkpoint(checkpoint, overwrite)  # again: another process may have written it meanwhile
    done = import_folder(source, checkpoint)
    entries = sum(map(len, read_manifest(checkpoint)["files"].values()))
    print(f"{checkpoint}: {done.model_type}, {count_parameters(done.config).total:,} parameters in {entries:,} tensors")
    if not done.tokenizer:
        print(f"without a tokenizer: {done.no_tokenizer}")


def check_new_checkpoint(checkpoint: str, overwrite: bool) -> None:
    """Check that a checkpoint can be written under this name.

    Raises:
        UsageError: the name does not end in .ckpt, or exists.
    """
    path = Path(checkpoint)
    if path.suffix != ".ckpt":
        raise UsageError(f"checkpoint={checkpoint} does not end in .ckpt; name it {path.name}.ckpt")
    if path.is_file():
        raise UsageError(f"checkpoint={checkpoint} is a file; a checkpoint is a folder: name another")
    if path.exists() and not overwrite:
        raise UsageError(f"checkpoint={checkpoint} exists already; name another, or add --overwrite")
