"""`nlgmoe import`: convert a folder in Hugging Face's format into a checkpoint of weights."""

from __future__ import annotations

from nlgmoe.cli.output_files import check_new_checkpoint


def import_checkpoint(source: str, checkpoint: str, overwrite: bool = False) -> None:
    """Convert a folder written by nlgmoe export, or a GPT-2 in Hugging Face's format, into a checkpoint.

    Args:
        source: the folder, or the name of a model on the Hugging Face hub, such as openai-community/gpt2.
        checkpoint: output folder, `NAME.ckpt`; use it, export it, or start runs from it with model.warm_start.
        overwrite: replace an existing checkpoint.
    """
    check_new_checkpoint("checkpoint", checkpoint, overwrite)
    from nlgmoe.checkpoint.folder import read_manifest  # these need torch
    from nlgmoe.model.counting import count_parameters
    from nlgmoe.tools.hugging_face.importing import import_folder

    done = import_folder(source, checkpoint, overwrite)
    entries = sum(map(len, read_manifest(checkpoint)["files"].values()))
    print(f"{checkpoint}: {done.model_type}, {count_parameters(done.config).total:,} parameters in {entries:,} tensors")
    if not done.tokenizer:
        print(f"without a tokenizer: {done.no_tokenizer}")
