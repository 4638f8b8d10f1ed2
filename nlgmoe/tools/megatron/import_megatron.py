"""`nlgmoe import-megatron`: convert a Megatron-DeepSpeed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nlgmoe.cli.arguments import check_new_checkpoint
from nlgmoe.validation import SettingError


def import_megatron(
    checkpoint: str,
    output: str,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    data_dir: str = "data/pocket_pile",
    qkv: Literal["auto", "heads", "thirds"] = "auto",
    accept_tanh_gelu: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a Megatron-DeepSpeed checkpoint (dense, MoE or PR-MoE) into a portable one with weights only.

    Code in the files is not run. A model that GPTConfig cannot describe is refused with the name of the argument. The new
    checkpoint can be evaluated, generated from, and used as `model.warm_start.checkpoint`.

    Args:
        checkpoint: the folder of a step, such as OUT/global_step1000, or the folder with the file `latest`.
        output: the checkpoint to write, NAME.ckpt.
        vocab_size: token ids to keep, other rows of the embedding are padding; default: the tokenizer's, without one all rows.
        tokenizer: as `data.tokenizer`, saved in the checkpoint; gpt2 for the tutorial's models.
        data_dir: folder of tokenizers given by name.
        qkv: layout of queries, keys and values in a weight: `heads`, interleaved by head; `thirds`, one after the other; `auto`,
            by the checkpoint's version and arguments. With a wrong layout the loss is that of an untrained model.
        accept_tanh_gelu: accept a model trained with --no-bias-gelu-fusion; its exact GELU becomes the tanh form.
        overwrite: replace an existing checkpoint.
    """
    check_new_checkpoint("output", output, overwrite, settings=False)
    from nlgmoe.checkpoint.verify import describe
    from nlgmoe.data.tokenizer_loading import load_tokenizer
    from nlgmoe.tools.megatron.checkpoint import import_checkpoint  # these need torch

    files = None
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer, Path(data_dir))
        vocab_size, files = loaded.vocab_size if vocab_size is None else vocab_size, loaded.files
        if loaded.vocab_size > vocab_size:
            raise SettingError(
                f"vocab_size={vocab_size} is below the {loaded.vocab_size} ids of tokenizer {loaded.name}; leave it out"
            )
    import_checkpoint(checkpoint, output, vocab_size, files, qkv, accept_tanh_gelu, overwrite)
    print(describe(Path(output)))
