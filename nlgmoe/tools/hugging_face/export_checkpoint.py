"""`nlgmoe export`: a folder that `transformers` loads without this project installed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from nlgmoe.validation import SettingError


def export_checkpoint(
    checkpoint: str,
    folder: str,
    max_shard_size: str = "5GB",
    precision: Literal["fp32", "bf16"] | None = None,
    tokenizer: str | None = None,
    data_dir: str = "data/pocket_pile",
) -> None:
    """Write a folder for AutoModelForCausalLM.from_pretrained, with tokenizer and model card.

    A model that OLMoE, Qwen3-MoE, Mixtral, Llama or Qwen3 compute is written for that class of transformers. Other models come
    with their code, which from_pretrained runs with trust_remote_code=True.

    Args:
        checkpoint: the folder, `NAME.ckpt`, or a run folder: its newest valid checkpoint is exported.
        folder: new folder.
        max_shard_size: maximum size of a file of weights; a larger tensor gets its own file.
        precision: precision of the weights, fp32 or bf16; default: the stored precision.
        tokenizer: as data.tokenizer, for a checkpoint without a tokenizer.
        data_dir: folder of tokenizers given by name.
    """
    if not Path(checkpoint).exists():
        raise SettingError(f"{checkpoint} does not exist; name a checkpoint, or the folder of a run")
    start = time.perf_counter()
    from nlgmoe.data.tokenizer import load_tokenizer  # these need torch
    from nlgmoe.tools.hugging_face.export import export

    given = None if tokenizer is None else load_tokenizer(tokenizer, Path(data_dir))
    done = export(checkpoint, folder, max_shard_size, precision, given)
    files = "1 file" if done.files == 1 else f"{done.files} files"
    seconds = time.perf_counter() - start
    print(f"{folder}: {done.checkpoint} in {done.size / 1e6:,.1f} MB, weights in {files}, {seconds:.1f} s")
    if done.family is None:
        print(
            f"with the model's code, because no class of transformers has {done.reason}: load it with trust_remote_code=True"
        )
    else:
        print(f"in the format of {done.family}: it needs no code of its own")
    if not done.tokenizer:
        print(
            "without a tokenizer: the checkpoint holds none; add the one that the model was trained with by --tokenizer"
        )
