"""`nlgmoe export` and `nlgmoe import`: folders that `transformers` loads, and checkpoints of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from nlgmoe.cli.arguments import check_new_checkpoint
from nlgmoe.files import yaml_beside
from nlgmoe.validation import SettingError


def export_checkpoint(
    checkpoint: str,
    folder: str,
    max_shard_size: str = "5GB",
    precision: Literal["fp32", "bf16"] | None = None,
    tokenizer: str | None = None,
    data_dir: str = "data/pocket_pile",
    family: str | None = None,
) -> None:
    """Write a folder for AutoModelForCausalLM.from_pretrained, with tokenizer and model card.

    A model that a family of docs/open_moes.md computes is written for that class of transformers. Other models come with their
    code, which from_pretrained runs with trust_remote_code=True.

    Args:
        checkpoint: the folder, `NAME.ckpt`, or a run folder: its newest valid checkpoint is exported.
        folder: new folder.
        max_shard_size: maximum size of a file of weights; a larger tensor gets its own file.
        precision: precision of the weights, fp32 or bf16; default: the stored precision.
        tokenizer: as data.tokenizer, for a checkpoint without a tokenizer.
        data_dir: folder of tokenizers given by name.
        family: class to write the model for, of those that compute it, such as mixtral; nlgmoe: with its code. Default: the class
            that it was imported from, or the first.
    """
    if not Path(checkpoint).exists():
        raise SettingError(f"{checkpoint} does not exist; name a checkpoint, or the folder of a run")
    start = time.perf_counter()
    from nlgmoe.data.tokenizer_loading import load_tokenizer  # these need torch
    from nlgmoe.tools.hugging_face.export import export

    given = None if tokenizer is None else load_tokenizer(tokenizer, Path(data_dir))
    done = export(checkpoint, folder, max_shard_size, precision, given, family)
    files = {file.name: file.stat().st_size for file in Path(folder).iterdir()}
    size, seconds = sum(files.values()) / 1e6, time.perf_counter() - start
    print(f"{folder}: {done.checkpoint} in {size:,.1f} MB, {seconds:.1f} s")
    if done.family is None:
        reason = f"; no class of transformers computes it: {done.reason}" if done.reason else ""
        print(f"with the model's code: load it with trust_remote_code=True{reason}")
    else:
        print(f"in the format of {done.family}: it needs no code of its own")
    if "tokenizer.json" not in files:
        print("without a tokenizer, and so without the token that ends a text: add the one of training by --tokenizer,")
        print("or copy the tokenizer and generation_config.json of an imported model into the folder")


def import_checkpoint(source: str, checkpoint: str, overwrite: bool = False) -> None:
    """Convert a folder of Hugging Face's format, or a GGUF file, into a checkpoint, and write a YAML file to use it with.

    Supported are the families of docs/open_moes.md, GPT-2, and what nlgmoe export writes; of GGUF files Llama.

    Args:
        source: the folder, a file NAME.gguf, or the name of a model on the Hugging Face hub, such as allenai/OLMoE-1B-7B-0924.
        checkpoint: output folder, `NAME.ckpt`; `NAME.yaml` beside it has the settings for train.py.
        overwrite: replace an existing checkpoint.
    """
    check_new_checkpoint("checkpoint", checkpoint, overwrite)
    from nlgmoe.model.counting import count_parameters  # these need torch
    from nlgmoe.tools.hugging_face.importing import import_model

    done, settings = import_model(source, checkpoint, overwrite), yaml_beside(Path(checkpoint))
    print(f"{checkpoint}: {done.model_type}, {count_parameters(done.config).total:,} parameters")
    print(f"{settings}: its settings")
    if done.dropped:
        blocks = ", ".join(sorted({name.split(".")[2] for name in done.dropped}))
        number = f"{len(done.dropped):,} tensors, such as {done.dropped[0]}"
        print(f"without block {blocks}, which predicts further tokens (MTP): {number}")
    if done.no_tokenizer:
        remedy = "add data.tokenizer, or a data.corpus of the model's token ids"
        print(f"without a tokenizer: {done.no_tokenizer}; {remedy}")
