"""`nlgmoe import`: convert a folder in Hugging Face's format into a checkpoint of weights."""

from __future__ import annotations

from nlgmoe.cli.output_files import check_new_checkpoint


def import_checkpoint(source: str, checkpoint: str, overwrite: bool = False) -> None:
    """Convert a folder of Hugging Face's format into a checkpoint, and write a YAML file to use it with.

    Supported are OLMoE, Qwen3-MoE, Mixtral, Llama, Qwen3, GPT-2, and what nlgmoe export writes (docs/open_moes.md).

    Args:
        source: the folder, or the name of a model on the Hugging Face hub, such as allenai/OLMoE-1B-7B-0924.
        checkpoint: output folder, `NAME.ckpt`; `NAME.yaml` beside it has the settings for train.py.
        overwrite: replace an existing checkpoint.
    """
    check_new_checkpoint("checkpoint", checkpoint, overwrite)
    from nlgmoe.checkpoint.folder import read_manifest  # these need torch
    from nlgmoe.model.counting import count_parameters
    from nlgmoe.tools.hugging_face.importing import import_folder

    done = import_folder(source, checkpoint, overwrite)
    entries = sum(map(len, read_manifest(checkpoint)["files"].values()))
    print(f"{checkpoint}: {done.model_type}, {count_parameters(done.config).total:,} parameters in {entries:,} tensors")
    print(f"{done.yaml}: settings; python train.py validate --config {done.yaml} --ckpt_path {checkpoint}")
    if not done.tokenizer:
        print(
            f"without a tokenizer: {done.no_tokenizer}; add data.tokenizer, or a data.corpus of the model's token ids"
        )
